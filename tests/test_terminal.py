import warnings

import pytest

from customized_grpo.terminal import quiet_libraries


def test_libraries_keep_quiet_and_a_cut_prompt_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CGRPO_DEBUG", "")
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with warnings.catch_warnings():
        quiet_libraries()
        warnings.showwarning = lambda *told: print(warnings.formatwarning(*told[:4]), end="")  # noqa: T201
        for module in ("customized_grpo.policies.flux_model", "torch.nn"):
            warnings.warn_explicit(f"A prompt is cut by {module}.", UserWarning, "file.py", 1, module=module)
    assert capsys.readouterr().out == "warning: A prompt is cut by customized_grpo.policies.flux_model.\n"
