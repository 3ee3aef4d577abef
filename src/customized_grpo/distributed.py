"""What the processes of a run agree on. With one process nothing here waits or costs anything."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from types import MappingProxyType
from typing import TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from customized_grpo.errors import TrainingError, UserError

T = TypeVar("T")
Record = Mapping[str, float]
NOTHING: Record = MappingProxyType({})


def join(cpu: bool) -> Accelerator:
    """This process among those of the run, once all of them are there.

    Raises:
        UserError: if one does not answer in time: 10 minutes on GPUs, 30 on CPUs.
    """
    try:
        return Accelerator(cpu=cpu)
    except torch.distributed.DistError as error:
        raise UserError(
            f"The {os.environ.get('WORLD_SIZE')} processes of this run did not come together "
            f"({str(error).splitlines()[0][:200]}); start the same command on all machines, with an address and a port "
            f"of the first one that the others can reach."
        ) from error


def warn_of_missing_processes(running: int, environment: Mapping[str, str] = os.environ) -> None:
    """Warn if a launcher or a cluster asked for more processes than are running together."""
    sizes = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_NTASKS")
    found = {name: int(value) for name in sizes if (value := environment.get(name, "")).isdecimal()}
    asked = max(found, key=lambda name: found[name], default="")
    if asked and found[asked] > running:
        seen = f"{asked} asks for {found[asked]} processes"
    elif running == 1 and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        seen = "`accelerate launch` was asked for several processes"  # it sets the address and starts one
    else:
        return
    warnings.warn(
        f"{seen}, but this run has {running}; to start more, use: torchrun --nproc_per_node N -m customized_grpo ...",
        stacklevel=1,
    )


def refuse_several(work: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError if a launcher started several processes of a command that does all of its work in each."""
    count = environment.get("WORLD_SIZE", "")
    if count.isdecimal() and int(count) > 1:
        raise UserError(f"`cgrpo {work}` works in one process, but WORLD_SIZE is {count}; run it without a launcher.")


def refuse_other_sharding(environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError if `accelerate launch` was asked for sharding that would be ignored here."""
    for flag in ("use_fsdp", "use_deepspeed", "use_megatron_lm", "use_parallelism_config"):
        if environment.get(f"ACCELERATE_{flag.upper()}", "false").lower() == "true":
            raise UserError(
                f"`accelerate launch` was given --{flag}, or accelerate's configuration has it, but this trainer "
                f"shards by training.sharding alone; remove it, and set training.sharding=fsdp2."
            )


class FailedElsewhere(Exception):
    """Another process fails, and says why in `fail_together`."""


@contextmanager
def fail_together(accelerator: Accelerator | None) -> Iterator[None]:
    """What fails inside on one process fails on all at the end, so that none waits for a gather that never comes.

    Args:
        accelerator: whose processes all come here; None is a process on its own.

    Raises:
        UserError, TrainingError: the one raised inside, by the first process that did, with `shared` set where there
            are several. Any other exception is raised as it is where it was, and as a TrainingError elsewhere. One that
            is marked `alone`, because the other processes cannot come here, is raised here only.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if accelerator is None or accelerator.num_processes == 1:
        if failure is not None:
            raise failure
        return
    if failure is not None and hasattr(failure, "alone"):
        raise failure
    if isinstance(failure, FailedElsewhere):
        failure = None
    expected = isinstance(failure, UserError | TrainingError)
    said = str(failure) if expected or failure is None else f"{type(failure).__name__}: {failure}"
    mine = None if failure is None else (said, isinstance(failure, UserError))
    everyone = gather_objects(accelerator, mine)
    if failure is not None and not expected:
        raise failure
    failed = {process: found for process, found in enumerate(everyone) if found is not None}
    if failed:
        process, (sentence, _) = next(iter(failed.items()))
        alike = len({sentence for sentence, _ in failed.values()}) == 1 and len(failed) == len(everyone)
        kind = UserError if all(by_user for _, by_user in failed.values()) else TrainingError
        error = kind(sentence if alike else f"Process {process}: {sentence}")
        error.shared = True
        raise error from failure


def any_process(accelerator: Accelerator, mine: bool) -> bool:
    """Whether it is true of any process; all get the same answer."""
    return any(gather_objects(accelerator, mine))


def gather(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Concatenate over processes along the first axis, on CPU."""
    if accelerator.num_processes == 1:
        return values
    with peers():
        return cast(Tensor, accelerator.gather(values.to(accelerator.device))).cpu()


def gather_objects(accelerator: Accelerator, mine: T) -> list[T]:
    """What each process has, in their order."""
    if accelerator.num_processes == 1:
        return [mine]
    with peers():
        return cast(list[T], gather_object([mine]))


def average(accelerator: Accelerator, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The mean over processes of each tensor."""
    if accelerator.num_processes == 1:
        return tensors
    with peers():
        return cast(Sequence[Tensor], accelerator.reduce(tensors, reduction="mean"))


def combine(
    accelerator: Accelerator, mean: Record, maximum: Record = NOTHING, total: Record = NOTHING
) -> dict[str, float]:
    """What each process measured, as one record of the run: the mean, the maximum or the sum over processes."""
    everyone = gather_objects(accelerator, (dict(mean), dict(maximum), dict(total)))
    ways: tuple[Callable[[list[float]], float], ...] = (fmean, max, sum)
    return {
        name: way([records[place][name] for records in everyone])
        for place, way in enumerate(ways)
        for name in everyone[0][place]
    }


@contextmanager
def peers(sure: bool = True) -> Iterator[None]:
    """A collective operation fails with the words of its transport when another process is gone. `sure`: whether there
    is nothing else inside that could fail."""
    try:
        yield
    except (torch.OutOfMemoryError, TrainingError):
        raise
    except RuntimeError as error:
        if not (sure or isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)):
            raise
        raise TrainingError(
            "Another process of this run is gone or does not answer, so this one stops too; the other one's own "
            "message, or the system's log if it was killed, says why."
        ) from error
