"""Where weights come from: the package itself, a local folder, or a hub id."""

import re
from pathlib import Path

from customized_grpo.errors import UserError

PACKAGED = "toyworld:"


def locate(path: str | Path) -> str:
    """The folder or hub id to hand to `from_pretrained`.

    Args:
        path: `toyworld:pipeline`, `toyworld:clip` ... for the packaged weights; a folder; or a hub id `owner/name`.

    Raises:
        UserError: if a packaged name is unknown, or a local path does not exist.
    """
    text = str(path)
    if text.startswith(PACKAGED):
        from customized_grpo.toyworld import weights_path

        return str(weights_path(text.removeprefix(PACKAGED)))  # pyright: ignore[reportArgumentType] - checked there
    folder = Path(text).expanduser()
    if folder.exists():
        return str(folder)
    looks_like_hub_id = text.count("/") == 1 and not text.startswith((".", "/", "~"))
    if looks_like_hub_id:
        return text
    raise UserError(f"'{text}' is neither a folder here nor a hub id like 'owner/name'; check the path.")


def explain(path: str | Path, what: str, error: Exception) -> UserError:
    """One sentence for a `from_pretrained` that failed."""
    reason = " ".join(str(error).split())
    if isinstance(error, ImportError) and (missing := re.search(r"requires the (\w+) library", reason)):
        package = missing[1].lower()
        build = ", of the build that fits your torch" if package == "torchvision" else ""
        return UserError(
            f"Could not load {what} from '{path}': it needs the package {package}, which is not here; "
            f"pip install {package}{build}."
        )
    first = re.split(r"(?<=\w\w)[.;]\s", reason)[0].rstrip(".")  # the rest is advice, which ours replaces
    return UserError(
        f"Could not load {what} from '{path}' ({type(error).__name__}: {first[:300]}); "
        f"give a folder in the layout that save_pretrained writes, or a hub id you have access to."
    )
