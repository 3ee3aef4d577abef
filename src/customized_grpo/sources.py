"""Locations of weights: the package itself, a local folder, or a hub id."""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from customized_grpo.errors import UserError, chain
from customized_grpo.libraries import library_problem
from customized_grpo.shell import program
from customized_grpo.store import read_json

PACKAGED = "toyworld:"


def locate(path: str | Path) -> str:
    """The folder or hub id to pass to `from_pretrained`.

    Args:
        path: `toyworld:pipeline`, `toyworld:clip` ... for the packaged weights; a folder; or a hub id `owner/name`.

    Raises:
        UserError: if a packaged name is unknown, or a local path does not exist.
    """
    text = str(path)
    if text.startswith(PACKAGED):
        from customized_grpo.toyworld import weights_path

        return str(weights_path(text.removeprefix(PACKAGED)))  # pyright: ignore[reportArgumentType] - checked there
    folder = str(Path(text).expanduser())
    if text and os.path.exists(folder):  # noqa: PTH110 (Path.exists raises for a name that is too long)
        return folder
    looks_like_hub_id = text.count("/") == 1 and not text.startswith((".", "/", "~"))
    if looks_like_hub_id:
        return text
    raise UserError(f"'{text[:100]}' is neither an existing folder nor a hub id such as 'owner/name'; check the path.")


class Location(NamedTuple):
    """What an argument of a class names, a folder or a hub id, and what is known of it before it is read.

    A class lists those of its arguments in `LOCATIONS`.
    """

    revision: str | None = None
    """The argument that holds the revision."""
    holds: str | None = None
    """JSON file that a folder must hold; with config.json there are weights too."""
    files: bool = False
    """Whether it may be a file."""


def check_location(path: str | Path, location: Location, revision: str | None = None) -> None:
    """Look whether a folder can be what it should, without loading it. Of a hub id only the form is checked.

    Raises:
        UserError: if it does not exist, lacks a file, is a file, or is given a revision.
    """
    source = Path(locate(path))
    pin(str(source), revision)
    if source.is_file() and not location.files:
        raise UserError(f"'{path}' is a file; expected a folder written by save_pretrained, or a hub id.")
    if not source.is_dir() or location.holds is None:
        return
    if not (source / location.holds).is_file():
        raise UserError(f"'{path}' holds no {location.holds}; expected a folder written by save_pretrained.")
    read_json(source / location.holds)
    if location.holds == "config.json":
        check_weights(source)


def check_weights(folder: Path) -> None:
    """Raise UserError for a folder of a model without weights."""
    if not any(next(folder.glob(f"*{ending}"), None) for ending in (".safetensors", ".bin", ".pt")):
        raise UserError(f"'{folder}' holds no weights, such as model.safetensors; is the download complete?")


PINNED = {
    "facebook/dinov2-base": "f9e44c814b77203eaa57a6bdbbd535f21ede1415",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    "openai/clip-vit-base-patch32": "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268",
    "openai/clip-vit-large-patch14": "32bd64288804d66eefd0ccbe215aa642df71cc41",
    "xswu/HPSv2": "697403c78157020a1ae59d23f111aa58ced35b0a",
    "yuvalkirstain/PickScore_v1": "a4e4367c6dfa7288a00c550414478f865b875800",
}
"""Commits of the default hub ids of rewards, so that scores stay reproducible."""


def pin(source: str, revision: str | None = None) -> dict[str, Any]:
    """The arguments of `from_pretrained` besides a source from `locate`: the revision of a hub id.

    Args:
        source: a folder or a hub id.
        revision: commit, tag or branch; default: the pinned commit of the default ids, the latest of others.

    Raises:
        UserError: if a revision is given for a local folder.
    """
    if os.path.exists(source):  # noqa: PTH110 (as in `locate`)
        if revision is not None:
            raise UserError(
                f"revision is '{revision}', but '{source}' is a local folder and has no revisions; remove revision."
            )
        return {}
    chosen = revision or PINNED.get(source)
    return {"revision": chosen} if chosen else {}


def hub_problem(repository: str | Path, error: Exception) -> str:
    """What is wrong if the hub did not hand out a repository, and what to do; empty if that is not the problem."""
    from huggingface_hub import errors as hub

    if Path(repository).expanduser().exists():
        return ""
    log_in = f"log in with `{program('hf')} auth login` or set HF_TOKEN"
    problems = {
        hub.GatedRepoError: f"it is gated; accept its licence at https://huggingface.co/{repository}, then {log_in}",
        hub.RepositoryNotFoundError: "the hub has no such repository, or it is private; check the name or give a local "
        f"path, and if it is private, {log_in}",
        hub.RevisionNotFoundError: "the repository has no such revision; check the setting revision",
        hub.HfHubHTTPError: "",
        (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, hub.HTTPError): "the hub cannot be reached, and there "
        "is no copy in its cache; check the connection and the name, or give a local path",
    }
    found = (problem for cause in chain(error) for kind, problem in problems.items() if isinstance(cause, kind))
    return next(found, "")


def explain(path: str | Path, what: str, error: Exception) -> UserError:
    """A one-sentence error for a failed `from_pretrained`."""
    if broken := library_problem(error):
        return broken
    if problem := hub_problem(path, error):
        return UserError(f"Could not load {what} from '{path}': {problem}.")
    reason = " ".join(str(error).split())
    if isinstance(error, ImportError) and (missing := re.search(r"requires the (\w+) library", reason)):
        package = missing[1].lower()
        build = ", in the build that matches your torch" if package == "torchvision" else ""
        return UserError(
            f"Could not load {what} from '{path}': the package {package} is not installed; "
            f"{program('pip')} install {package}{build}."
        )
    first = re.split(r"(?<=\w\w)[.;]\s", reason)[0].rstrip(".")  # the rest is advice, which ours replaces
    return UserError(
        f"Could not load {what} from '{path}' ({type(error).__name__}: {first[:300]}); "
        f"expected a folder written by save_pretrained, or a hub id that you have access to."
    )
