from pathlib import Path

import pytest

from customized_grpo.errors import UserError
from customized_grpo.sources import Location, check_location, explain, locate


def test_a_missing_package_is_named_with_what_to_do() -> None:
    text = "Qwen2VLVideoProcessor requires the Torchvision library but it was not found. Check out ..."
    assert str(explain("qwen", "a QwenImageEditPlusPipeline", ImportError(text))) == (
        "Could not load a QwenImageEditPlusPipeline from 'qwen': the package torchvision is not installed; "
        "pip install torchvision, in the build that matches your torch."
    )


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
