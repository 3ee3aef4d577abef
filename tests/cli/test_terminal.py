import io
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from rich.padding import Padding
from rich.table import Table

import customized_grpo
from customized_grpo.cli.terminal import new_console, quiet_libraries

ROOT = Path(customized_grpo.__file__).parent
MARKUP = "[/] [red]a[/red] [bold] :dog: [link=x] \\[ /tmp/[x]/y"
CONTROL = "a\x1b[31m\x07\x00\u202e\x9b\udce9"


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


def test_retries_of_the_hub_are_not_printed() -> None:
    """In a process of its own: the library sets its level when it is first imported."""
    code = "import logging; from customized_grpo.cli.terminal import quiet_libraries; quiet_libraries(); "
    code += "logging.getLogger('huggingface_hub.utils._http').warning('Retrying in 1s.')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Retrying" not in done.stdout + done.stderr


def test_text_from_outside_is_printed_as_it_is() -> None:
    console = new_console(file=io.StringIO())
    table = Table(MARKUP, title=MARKUP)
    table.add_row(MARKUP)
    for printed in (MARKUP, table, Padding(MARKUP, (0, 0, 0, 2))):
        console.file = io.StringIO()
        console.print(printed)
        assert console.file.getvalue().count(MARKUP) == (3 if printed is table else 1)
    console.file = io.StringIO()
    console.print(CONTROL)
    assert console.file.getvalue() == "a\\x1b[31m\\x07\\x00\\u202e\\x9b\\udce9\n"


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", "d\\xf6g \\u72ac"), ("cp1252", "dög \\u72ac"), ("utf-8", "dög 犬")]
)
def test_what_the_output_cannot_show_is_escaped(encoding: str, shown: str) -> None:
    buffer = io.BytesIO()
    console = new_console(file=io.TextIOWrapper(buffer, encoding))
    console.print("dög 犬")
    console.file.flush()
    assert buffer.getvalue().decode(encoding).strip() == shown


def test_strings_hold_no_markup_and_every_console_prints_them_as_they_are() -> None:
    """Style is given by arguments and `Text`, so that text from outside needs no escaping anywhere."""
    for file in ROOT.rglob("*.py"):
        source = file.read_text(encoding="utf-8")
        if file.name != "terminal.py":
            made = re.findall(r"(?<!Plain)\bConsole\((\w+=\w+|)", source)
            assert set(made) <= {"quiet=True"}, file
            assert "rich.markup" not in source, file
            assert all("markup=False" in column for column in re.findall(r'TextColumn\("\{.*?\}"(.*?)\)', source)), file
        if "console" in source:
            assert not re.search(r"\[(bold|dim|red|green|yellow|\{tone\}|\{colour\})[^\]\[\"]*\]|\[/", source), file


@pytest.mark.parametrize(("end", "status"), [("pass", 0), ("sys.exit(3)", 3), ("sys.exit('gone')", 1), ("1 / 0", 1)])
@pytest.mark.parametrize("several", [True, False])
def test_one_of_several_processes_ends_without_the_shutdown_of_the_interpreter(several, end, status):
    script = f"""
import atexit, os, sys, types
from customized_grpo.cli.terminal import leave_at_once
class Slow:
    def __del__(self):
        sys.stderr.write("shut down")
slow = Slow()
atexit.register(print, "registered")
os.environ["WORLD_SIZE"] = "{2 if several else 1}"
sys.modules["torch.distributed"] = types.SimpleNamespace()
with leave_at_once():
    print("work")
    {end}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (status, ["work", "registered"])
    assert ("shut down" in done.stderr) != several
    assert ("gone" in done.stderr, "ZeroDivisionError" in done.stderr) == ("gone" in end, "/" in end)
