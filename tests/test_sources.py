from pathlib import Path
from unittest.mock import Mock

import pytest
from huggingface_hub import errors as hub

from customized_grpo.errors import UserError
from customized_grpo.sources import Location, check_location, explain, locate


def test_a_missing_package_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("customized_grpo.sources.program", lambda name: name)
    text = "Qwen2VLVideoProcessor requires the Torchvision library but it was not found. Check out ..."
    assert str(explain("qwen", "a QwenImageEditPlusPipeline", ImportError(text))) == (
        "Could not load a QwenImageEditPlusPipeline from 'qwen': the package torchvision is not installed; "
        "pip install torchvision, in the build that matches your torch."
    )


UNREACHABLE = (
    "the hub cannot be reached, and there is no copy in its cache; check the connection and the name, or give a "
    "local path."
)


@pytest.mark.parametrize(
    ("cause", "problem"),
    [
        (
            hub.GatedRepoError("403 Client Error.", response=Mock()),
            "it is gated; accept its licence at https://huggingface.co/owner/name, then log in with `hf auth login` or "
            "set HF_TOKEN.",
        ),
        (
            hub.RepositoryNotFoundError("401 Client Error.", response=Mock()),
            "the hub has no such repository, or it is private; check the name or give a local path, and if it is "
            "private, log in with `hf auth login` or set HF_TOKEN.",
        ),
        (
            hub.RevisionNotFoundError("404 Client Error.", response=Mock()),
            "the repository has no such revision; check the setting revision.",
        ),
        (hub.LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub."), UNREACHABLE),
        (hub.OfflineModeIsEnabled("Cannot reach the hub: offline mode is enabled."), UNREACHABLE),
        (hub.HTTPError("[Errno -2] Name or service not known"), UNREACHABLE),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_the_hub_does_not_hand_out_is_one_sentence_with_what_to_do(
    cause: Exception, problem: str, wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`wrapped`: diffusers and transformers raise an OSError of their own instead."""
    monkeypatch.setattr("customized_grpo.sources.program", lambda name: name)
    error = OSError("owner/name is not a local folder and is not a valid model identifier.") if wrapped else cause
    error.__context__ = cause if wrapped else None
    assert str(explain("owner/name", "a model", error)) == f"Could not load a model from 'owner/name': {problem}"


def test_a_missing_file_and_a_local_folder_are_not_the_fault_of_the_hub(tmp_path: Path) -> None:
    missing = hub.RemoteEntryNotFoundError("404 Client Error.", response=Mock())
    assert "expected a folder written by save_pretrained" in str(explain("owner/name", "a model", missing))
    local = hub.LocalEntryNotFoundError("No config.json.")
    assert "expected a folder written by save_pretrained" in str(explain(tmp_path, "a model", local))


def test_what_a_library_advises_is_left_out() -> None:
    text = "We couldn't connect to 'https://huggingface.co' to load the files.\nCheck your connection. See the docs."
    assert str(explain("a/b", "a DINO model", OSError(text))) == (
        "Could not load a DINO model from 'a/b' (OSError: We couldn't connect to 'https://huggingface.co' to load the "
        "files); expected a folder written by save_pretrained, or a hub id that you have access to."
    )


def test_a_path_is_a_folder_or_a_hub_id() -> None:
    assert locate("owner/name") == "owner/name"
    with pytest.raises(UserError, match="neither an existing folder nor a hub id"):
        locate("./absent")


def test_a_folder_is_looked_into_and_a_hub_id_is_not(tmp_path: Path) -> None:
    model = Location("revision", "config.json")
    check_location("owner/name", model, "main")
    check_location("toyworld:clip", model)
    (tmp_path / "file.pt").write_text("")
    check_location(tmp_path / "file.pt", Location(files=True))
    for path, revision, sentence in (
        ("", None, "'' is neither an existing folder nor a hub id"),
        ("n" * 300, None, "'n{100}' is neither"),
        (tmp_path, None, "holds no config.json; expected a folder written by save_pretrained"),
        (tmp_path / "file.pt", None, "file.pt' is a file; expected a folder"),
        ("toyworld:clip", "main", "is a local folder and has no revisions"),
    ):
        with pytest.raises(UserError, match=sentence):
            check_location(path, model, revision)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json.: not JSON"):
        check_location(tmp_path, model)
    (tmp_path / "config.json").write_text("{}")
    check_location(tmp_path, model)
    (tmp_path / "file.pt").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        check_location(tmp_path, model)
