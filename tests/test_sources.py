import pytest

from customized_grpo.errors import UserError
from customized_grpo.sources import explain, locate


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
