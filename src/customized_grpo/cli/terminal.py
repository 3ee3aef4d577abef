"""What all commands share: reading arguments, the console, and silencing libraries."""

import atexit
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from customized_grpo.errors import UserError, printable

if TYPE_CHECKING:
    from customized_grpo.trust import Item


TrustCode = Annotated[
    bool, typer.Option("--trust-code", help="Run the code that the file or folder names; docs/security.md.")
]

Checkpoint = Annotated[
    str | None, typer.Option("--checkpoint", "--iteration", help="best, last, or an iteration; default: last.")
]


def split_settings(settings: list[str] | None, kind: str = "configuration file") -> tuple[Path | None, list[str]]:
    """The configuration file (or another kind of file) and the overrides among the arguments."""
    words = list(settings or [])
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise UserError(f"Give one {kind}, got {' and '.join(files)}; overrides look like section.name=1.")
    return (Path(files[0]) if files else None), [word for word in words if "=" in word]


def fraction(text: str | None, option: str) -> tuple[int, int] | None:
    """(2, 8) of `2/8`, the second of eight; None if the option was not given."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"{option} is '{text}'; the second of eight is {option} 2/8.")
    return int(match[1]), int(match[2])


class PlainConsole(Console):
    """Prints strings as they are: prompts, paths and names may hold brackets, emoji codes and control characters.

    Style comes from arguments and `Text`, never from markup or the look of a word. What the output cannot show is
    written as an escape.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text.expandtabs(), self.encoding), **options)


def new_console(**options: Any) -> Console:
    """A console for standard output. Without a terminal it is wide, because tables in a log should not be folded."""
    folded = sys.stdout.isatty() or "COLUMNS" in os.environ
    return PlainConsole(width=None if folded else 140, **options)


def show_trusted(console: Console, found: "Iterable[Item]") -> None:
    """Print in one line what a command that trusts its file will run outside this package; first process only."""
    from customized_grpo.trust import describe

    if found and os.environ.get("RANK", "0") == "0":
        console.print(f"trusted: {describe(found)}", soft_wrap=True)


def quiet_libraries() -> None:
    """Hide the progress bars and advice of other libraries, which would drown our output. --debug shows them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if os.environ.get("CGRPO_DEBUG"):
        return
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", category=UserWarning, module=r"customized_grpo\.")
    warnings.formatwarning = lambda message, *place, **more: f"warning: {printable(' '.join(str(message).split()))}\n"
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    hub_logging.set_verbosity_error()  # its retries, when the error says it all
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


@contextmanager
def leave_at_once() -> Iterator[None]:
    """End one of several processes when the block ends: exit functions run, but the interpreter's shutdown does not.
    A single process continues after the block.

    A thread of PyTorch's gloo may still hold a tensor of the last collective operation. If it releases the tensor while
    the interpreter shuts down, the process aborts (with torch 2.13, one exit in ten on a busy machine), and the
    launcher reports a failure.
    """
    status: object = 0
    try:
        yield
    except BaseException as error:
        if not _is_one_of_several():
            raise
        status = error.code if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        elif isinstance(status, str):
            print(status, file=sys.stderr)
    if not _is_one_of_several():
        return
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def _is_one_of_several() -> bool:
    """Whether a launcher started this process beside others, and it has imported torch.distributed. The process group
    is not asked, because gloo's threads outlive it."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and "torch.distributed" in sys.modules
