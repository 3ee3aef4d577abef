"""The contract of rewards, `check_reward` that tests it, and helpers for rewards that hold a model."""

import copy
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from PIL.Image import Image
from torch import Tensor

from customized_grpo.errors import UserError
from customized_grpo.libraries import quiet_loading
from customized_grpo.sources import explain, locate, pin
from customized_grpo.structures import Example

Reduce = Literal["mean", "max"]
"""Over the references of one subject: the mean of the scores, or the best."""

T = TypeVar("T")


@runtime_checkable
class Reward(Protocol):
    """A plain function, or an object that holds a model. `call_reward` calls it.

    An attribute `RUNTIME` names arguments that do not change the scores, so that a resumed run may change them. One
    that compares the images of one example has an attribute `whole_groups = True`: training and evaluation give it all
    images of an example in one call.
    """

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """Score images.

        Args:
            images: shape (B, 3, H, W), float32 in [0, 1]; a copy, which may be changed.
            examples: B of them, row by row, also copies; the rows of a group hold the same object.

        Returns:
            Shape (B,), real and dense, higher is better, in the reward's own units; NaN where it cannot score.
        """
        ...


class RewardUnavailable(UserError):
    """A reward that still fails after retries. The run stops, and can be resumed from its last checkpoint."""


def reward_name(reward: Callable[..., Tensor]) -> str:
    """`reward.name` if it has one, else the name of the function or class."""
    reward = _unbound(reward)
    name = getattr(reward, "name", None) or getattr(reward, "__name__", None)
    return str(name or type(reward).__name__)


def import_path(reward: Callable[..., Tensor]) -> str:
    """module:name, to name the code that failed in an error."""
    reward = _unbound(reward)
    owner = reward if inspect.isroutine(reward) else type(reward)
    return f"{owner.__module__}:{getattr(owner, '__qualname__', type(reward).__name__)}"


def _unbound(reward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function to which the configuration bound arguments."""
    return _unbound(reward.func) if isinstance(reward, partial) else reward


def once_per_example(examples: Sequence[Example], compute: Callable[[list[Example]], Tensor]) -> Tensor:
    """Compute a row for each distinct example and repeat it in the batch, so that the text of a group is encoded once.

    Args:
        examples: B of them, with repetitions.
        compute: distinct examples (U of them) to a tensor (U, ...).

    Returns:
        Shape (B, ...).
    """
    alike = groups(examples)
    computed = compute([examples[rows[0]] for rows in alike])
    place = {row: n for n, rows in enumerate(alike) for row in rows}
    return computed[torch.tensor([place[row] for row in range(len(examples))], device=computed.device)]


def groups(examples: Sequence[Example]) -> list[list[int]]:
    """The rows of each distinct example, in the order in which examples first appear."""
    rows: dict[int, list[int]] = {}
    for row, example in enumerate(examples):
        rows.setdefault(id(example), []).append(row)
    return list(rows.values())


def in_batches(compute: Callable[[Tensor], Tensor], rows: Tensor, size: int) -> Tensor:
    """`compute(rows)`, `size` rows at a time, so that memory does not grow with the number of rows."""
    return torch.cat([compute(chunk) for chunk in rows.split(size)])


def reference_similarity(
    embedded: Tensor, examples: Sequence[Example], embed: Callable[[list[Image]], Tensor],
    pictures: Callable[[Example], list[Image]], reduce: Reduce,
) -> Tensor:  # fmt: skip
    """Cosine of every row with the references of its example.

    Args:
        embedded: shape (B, D), of length 1.
        examples: B of them, with one or more references each.
        embed: a list of R pictures to (R, D), rows of length 1.
        pictures: the references of an example, as they are to be embedded.
        reduce: over several references.

    Returns:
        Shape (B,).
    """

    def padded(distinct: list[Example]) -> Tensor:  # (U, R, D), NaN where an example has fewer than R references
        groups = [pictures(example) for example in distinct]
        rows = embed([picture for group in groups for picture in group]).split([len(group) for group in groups])
        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=torch.nan)

    cosines = torch.einsum("bd,brd->br", embedded, once_per_example(examples, padded))
    return cosines.nanmean(-1) if reduce == "mean" else cosines.nan_to_num(-2.0).amax(-1)


def check_reduce(reduce: str) -> Reduce:
    """`reduce` if it is one of the two.

    Raises:
        UserError: if not.
    """
    if reduce not in ("mean", "max"):
        raise UserError(f"reduce is '{reduce}'; over several references it must be 'mean' or 'max'.")
    return reduce


def load(what: str, path: str | Path, read: Callable[..., T], revision: str | None = None) -> T:
    """`read` the folder or hub id that `path` stands for, at a revision: `read(source, revision=...)`.

    Raises:
        UserError: with the path, what was expected there, and what went wrong.
    """
    source = locate(path)
    pinned = pin(source, revision)
    try:
        with quiet_loading("transformers"):
            return read(source, **pinned)
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in as many ways as there are readers
        raise explain(path, what, error) from error


def frozen(model: torch.nn.Module, device: str | int | None) -> torch.nn.Module:
    """The model in evaluation mode, without gradients, on `device`; None is the fastest device there is."""
    fastest = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().requires_grad_(False).to(fastest if device is None else device)


def call_reward(reward: Callable[..., Tensor], images: Tensor, examples: Sequence[Example]) -> Tensor:
    """The scores of a reward, which cannot disturb the run or the other rewards.

    It gets its own copy of the images and the examples, so it may work in place. It is called inside `contained`.

    Args:
        reward: obeys `Reward`.
        images: shape (B, 3, H, W), float32 in [0, 1].
        examples: B of them, row by row.

    Returns:
        Shape (B,), float32 on the CPU; NaN where it could not score. An infinite score counts as NaN.

    Raises:
        UserError: naming the reward, if it fails, returns something else, or breaks a rule of `contained`.
    """
    path, count = import_path(reward), len(examples)
    try:
        with contained(f"The reward {path}"):
            scores = check_scores(reward(images.detach().clone(), _copies(examples)), reward, count)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"The reward {path} failed on {count} images, the first for example '{examples[0].id}': "
            f"{type(error).__name__}: {error}. Return NaN for an image it cannot score."
        ) from error
    return torch.where(scores.isfinite(), scores, torch.nan)


def _copies(examples: Sequence[Example]) -> list[Example]:
    """Copies with pictures of their own, one object for each distinct example."""
    copies = {id(example): copy.copy(example) for example in {id(example): example for example in examples}.values()}
    for example in copies.values():
        pictures = {"references": example.references, "masks": example.masks}
        for name, some in pictures.items():
            object.__setattr__(example, name, tuple(picture and picture.copy() for picture in some))
        object.__setattr__(example, "target", example.target and example.target.copy())
    return [copies[id(example)] for example in examples]


def _directory() -> str:
    try:
        return str(Path.cwd())
    except OSError:  # it was removed
        return ""


def _set_autocast(state: tuple[bool, ...]) -> None:
    for device, enabled in zip(_AUTOCAST, state, strict=True):
        torch.set_autocast_enabled(device, enabled)


_AUTOCAST = ("cpu", "cuda")
_KEPT: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the working directory": (_directory, os.chdir),
    "whether gradients are recorded": (torch.is_grad_enabled, torch.set_grad_enabled),
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "the default device": (
        torch.get_default_device,
        lambda device: torch.set_default_device(None if device.type == "cpu" else device),
    ),
    "autocast": (lambda: tuple(map(torch.is_autocast_enabled, _AUTOCAST)), _set_autocast),
}
"""State of the process that the run depends on: a function that reads it, and one that sets it."""


@contextmanager
def contained(who: str) -> Iterator[None]:
    """Run code of a reward, then restore what it changed in the process.

    Warnings filters are restored without an error, because libraries change them when they are imported.

    Args:
        who: the beginning of the error's sentence.

    Raises:
        UserError: if the code exits, or changed the working directory, the recording of gradients, the default dtype
            or device, or autocast.
        KeyboardInterrupt: with a sentence, if it was interrupted.
    """
    before = {what: read() for what, (read, _) in _KEPT.items()}
    filters = list(warnings.filters)
    changed: list[str] = []
    try:
        yield
    except SystemExit as error:
        raise UserError(f"{who} called sys.exit({error.code!r}); raise an exception instead.") from error
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"{who} was interrupted.") from error
    finally:
        for what, (read, write) in _KEPT.items():
            if read() != before[what]:
                changed.append(what)
                with suppress(OSError):  # a directory that is gone
                    write(before[what])
        if list(warnings.filters) != filters:
            warnings.resetwarnings()  # so that Python notices
            warnings.filters = filters
    if changed:
        raise UserError(
            f"{who} changed {' and '.join(changed)} for the whole process, which the run depends on; "
            f"put it back before returning, as a `with` block does."
        )


def check_scores(scores: Tensor, reward: Callable[..., Tensor], count: int) -> Tensor:
    """`scores` as float32 (count,) on the CPU, or a UserError that names the reward."""
    if not isinstance(scores, Tensor):
        seen = type(scores).__name__
    elif scores.is_meta or scores.is_quantized or scores.is_nested or scores.layout != torch.strided:
        seen = f"a {'meta' if scores.is_meta else 'quantized' if scores.is_quantized else 'sparse or nested'} tensor"
    elif scores.is_complex():
        seen = "complex numbers"
    elif scores.shape != (count,):
        seen = f"shape {tuple(scores.shape)}"
    else:
        return scores.detach().to("cpu", torch.float32)
    raise UserError(
        f"The reward {import_path(reward)} returned {seen} for {count} images; "
        f"it must return a tensor of shape ({count},), one real number per image (NaN if it cannot score)."
    )


def check_reward(reward: Callable[..., Tensor], images: Tensor, examples: Sequence[Example]) -> None:
    """Check that a reward obeys the contract on the given images (two or more).

    Checks shape, determinism, and batch equivariance: permuting the rows permutes the scores.

    Raises:
        UserError: naming the first property that does not hold.
    """
    count = len(examples)
    if count < 2 or len(images) != count:
        raise UserError(f"check_reward needs two images or more and as many examples, got {len(images)} and {count}.")
    first, again = (call_reward(reward, images, examples) for _ in range(2))
    path = import_path(reward)
    if not torch.allclose(first, again, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise UserError(f"The reward {path} gave different scores for the same images: it must be deterministic.")
    flipped = call_reward(reward, images.flip(0), list(examples)[::-1]).flip(0)
    if not torch.allclose(first, flipped, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise UserError(f"The reward {path} scores an image by its place in the batch: rows must not mix.")
