import pytest

from customized_grpo.errors import UserError
from customized_grpo.sources import explain, locate


def test_a_missing_package_is_named_with_what_to_do() -> None:
    text = "Qwen2VLVideoProcessor requires the Torchvision library but it was not found. Check out ..."
    assert str(explain("qwen", "a QwenImageEditPlusPipeline", ImportError(text))) == (
        "Could not load a QwenImageEditPlusPipeline from 'qwen': it needs the package torchvision, which is not here; "
        "pip install torchvision, of the build that fits your torch."
    )


def test_what_a_library_advises_is_left_out() -> None:
    text = "We couldn't connect to 'https://huggingface.co' to load the files.\nCheck your connection. See the docs."
    assert str(explain("a/b", "a DINO model", OSError(text))) == (
        "Could not load a DINO model from 'a/b' (OSError: We couldn't connect to 'https://huggingface.co' to load the "
        "files); give a folder in the layout that save_pretrained writes, or a hub id you have access to."
    )


def test_a_path_is_a_folder_or_a_hub_id() -> None:
    assert locate("owner/name") == "owner/name"
    with pytest.raises(UserError, match="neither a folder here nor a hub id"):
        locate("./absent")
