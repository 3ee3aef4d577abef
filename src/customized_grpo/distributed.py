"""What the processes of a run agree on. With one process nothing here waits or costs anything."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from customized_grpo.errors import UserError


@contextmanager
def fail_together(accelerator: Accelerator | None) -> Iterator[None]:
    """What fails inside on one process fails on all at the end, so that none waits for a gather that never comes.

    Args:
        accelerator: whose processes all come here; None is a process on its own.

    Raises:
        UserError: the one raised inside, by the first process that did, with `shared` set where there are several.
    """
    failure: UserError | None = None
    try:
        yield
    except UserError as error:
        failure = error
    if accelerator is None or accelerator.num_processes == 1:
        if failure is not None:
            raise failure
        return
    sentences = cast("list[str | None]", gather_object([None if failure is None else str(failure)]))
    for process, sentence in enumerate(sentences):
        if sentence is not None:
            error = UserError(f"Process {process}: {sentence}")
            error.shared = True
            raise error from failure


def any_process(accelerator: Accelerator, mine: bool) -> bool:
    """Whether it is true of any process; all get the same answer."""
    return mine if accelerator.num_processes == 1 else any(gather_object([mine]))


def gather(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Concatenate over processes along the first axis, on CPU."""
    if accelerator.num_processes == 1:
        return values
    return cast(Tensor, accelerator.gather(values.to(accelerator.device))).cpu()
