"""Estimate the device memory of a run before it starts, from passes of up to three rows."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from customized_grpo.errors import UserError
from customized_grpo.policies.contract import Policy, repeat
from customized_grpo.structures import Example


@dataclass(frozen=True)
class Workload:
    """The sizes that decide the memory of a run. Rows are those of one process."""

    rows: int
    """Rows of one iteration: prompts x generations. All rollouts are kept until the update is done."""
    chunk: int
    """Rows sampled in one batch of the rollout, which training passes do not cross."""
    micro_batch: int
    """Rows in one training pass."""
    sampled: int
    """Rows in one batch of the rollout or of the evaluation, whichever has more."""
    kept: int
    """Latents kept for each row of a rollout."""
    base: bool = False
    """Whether the base policy runs beside the trained one."""
    copies: int = 0
    """Copies of the trained weights on the device: their average, an old policy, the base policy."""
    predicted: int = 0
    """Images kept for each row of a rollout besides the final one."""
    swapped: bool = False
    """Whether the weights of an old policy replace the trained ones while sampling."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of a run at its peak on its device."""

    parts: Mapping[str, int]
    """Bytes by purpose."""

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        """`3.2 GiB: weights 2.1, optimizer 0.3, activations 0.8`, without parts that would read as zero."""
        unit, name, digits = (2**30, "GiB", 1) if self.total >= 2**30 else (2**20, "MiB", 0)
        parts = [f"{part} {n / unit:.{digits}f}" for part, n in self.parts.items() if round(n / unit, digits)]
        return f"{self.total / unit:.{digits}f} {name}: {', '.join(parts)}"


def estimate_memory(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    example: Example,
    work: Workload,
    others: Iterable[object] = (),
) -> MemoryEstimate:
    """Peak memory of a run on `policy.device`: on a GPU what PyTorch allocates, on a CPU what the process holds.

    Two rows and three rows are passed forward and backward, and decoded. The memory after each operation is linear in
    the number of rows, and the peak is the largest of these moments at the run's own number of rows. Gradient
    checkpointing, autocast and attention kernels are therefore included. What rewards need while they score is not.

    Args:
        policy: as it will train.
        optimizer: of its trainable parameters.
        example: stands for all examples.
        work: the sizes of the run.
        others: other objects that hold models: rewards and metrics.

    Ours: extrapolating moment by moment, because with more rows the peak is at another moment.
    """
    passes = Passes(policy, example, work.base)
    parameters, on_gpu = policy.trainable_parameters(), policy.device.type == "cuda"
    trained = size_of(parameters)
    stages = by_stage(
        passes, work, trained, trained if on_gpu else max(size_of([parameter]) for parameter in parameters)
    )
    weights = size_of(tensor for module in modules([policy, *others]) for tensor in _tensors(module, policy.device))
    average, held = trained * work.copies, size_of(_state(optimizer))
    return MemoryEstimate(
        {
            "other" if on_gpu else "libraries": max(0, in_use(policy.device) - weights - average - held),
            "weights": weights,
            "optimizer": optimizer_bytes(optimizer),
            "average": average,
            "rollout": kept_bytes(passes, work),
            **max(stages.values(), key=lambda parts: sum(parts.values())),
        }
    )


def by_stage(passes: "Passes", work: Workload, trained: int, step: int) -> dict[str, dict[str, int]]:
    """Bytes by purpose that each stage of an iteration needs besides the resident memory.

    Args:
        passes: what is measured.
        work: the sizes of the run.
        trained: bytes of the trained weights.
        step: bytes that the optimizer needs while it steps.
    """
    decoding = peak(passes.decode, min(work.sampled, passes.decode_batch or work.sampled))
    return {
        "encode": {"encoding": passes.encoding},
        "rollout": {
            "swapped weights": trained * work.swapped,
            "sampling": work.sampled * passes.conditioning_bytes + peak(passes.forward, work.sampled),
        },
        "decode": {"decoding": 2 * work.sampled * passes.picture_bytes + decoding},
        "update": {"gradients": trained, "activations": peak(passes.learn, work.micro_batch)},
        "optimizer": {"gradients": trained, "optimizer step": step},
    }


def kept_bytes(passes: "Passes", work: Workload) -> int:
    """Bytes that all rollouts of an iteration keep until its update is done."""
    per_row = passes.latent_bytes * work.kept + passes.conditioning_bytes
    return work.rows * (per_row + passes.picture_bytes * (1 + work.predicted))


LOWER = {
    "rollout": "lower rollout.chunk_prompts or set policy.offload=cpu",
    "rewards": "lower the batch_size of the reward or set its device=cpu",
    "update": "lower training.micro_batch (in bfloat16 with training.old_log_probs=recompute) or set "
    "policy.gradient_checkpointing=true",
    "evaluation": "lower evaluation.batch and the batch_size of rewards and metrics, or set policy.offload=cpu",
}
"""How to need less memory, by stage of a run. A resumed run may change all of these settings."""
FULL = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")
"""Parts of the messages of libraries that raise neither MemoryError nor torch.OutOfMemoryError."""


@contextmanager
def explain_full_device(
    device: torch.device, stage: str = "", estimate: MemoryEstimate | None = None
) -> Iterator[None]:
    """Turn a failed allocation into a UserError that says what to lower.

    Args:
        device: of the policy.
        stage: a key of LOWER; empty before the run, when all of them may help.
        estimate: the memory that the run is expected to need.
    """
    try:
        yield
    except Exception as error:
        failed = _failed_allocation(error)
        if failed is None:
            raise
        where = f"in the stage {stage}" if stage else f"for the run, which needs about {estimate}" if estimate else ""
        said = str(error).partition(f": {type(failed).__name__}")[0] if isinstance(error, UserError) else str(failed)
        raise UserError(
            f"Memory ran out on {device} {where or 'with three images'} ({' '.join(said.split())[:150]}); "
            f"{LOWER.get(stage) or ', '.join(LOWER.values())}, or start a new run with a smaller policy.resolution or "
            f"policy.dtype=bfloat16."
        ) from error


def _failed_allocation(error: BaseException | None) -> BaseException | None:
    """The error itself, or the one that caused it, if it is a failed allocation on any device."""
    if error is None or isinstance(error, MemoryError | torch.OutOfMemoryError):
        return error
    if isinstance(error, RuntimeError | OSError | UserError) and any(words in str(error) for words in FULL):
        return error
    return _failed_allocation(error.__cause__)


# ---- what is measured


class Moments(TorchDispatchMode):
    """Records, after every operation, how many bytes were allocated inside the block and are not freed yet.

    On a GPU the allocator reports the peak within each operation. Elsewhere, the tensors that operations return are
    followed until they are freed.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.bytes, self.device, self._seen = [0], device, set[int]()
        self.operations: list[object] = [None]
        """The operations with the shapes of their results, one for each of `bytes`."""
        self._now, self._before = 0, torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        out = func(*args, **(kwargs or {}))
        if self.device.type == "cuda":
            self.bytes.append(torch.cuda.max_memory_allocated(self.device) - self._before)
        else:
            if not func.is_view:
                self._follow(tree_leaves(out), (args, kwargs))
            self.bytes.append(self._now)
        self.operations.append((func, [getattr(made, "shape", None) for made in tree_leaves(out)]))
        return out

    def _follow(self, made: list[Any], given: Any) -> None:
        new = {storage._cdata: storage for storage in _storages(made) if storage._cdata not in self._seen}
        for storage in _storages(tree_leaves(given)) if new else ():
            new.pop(storage._cdata, None)  # in place, on what was there before
        for key, storage in new.items():
            self._seen.add(key)
            self._now += storage.nbytes()
            finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._now -= size


def peak(moments: Callable[[int], list[int]], rows: int) -> int:
    """The largest of `moments(rows)`, extrapolated from two and three rows where there are more. Many operations treat
    one row as a special case."""
    if rows <= 3:
        return max(moments(rows))
    two, three = moments(2), moments(3)
    if len(two) != len(three):
        two, three = [max(two)], [max(three)]
    return max(a + (b - a) * (rows - 2) for a, b in zip(two, three, strict=True))


class Passes:
    """The passes of a run with `count` rows of one example. Each returns the bytes after every operation.

    Args:
        policy: as it will train.
        example: is encoded, which needs no memory if the policy has cached it.
        base: whether the base policy runs beside the trained one.
    """

    def __init__(self, policy: Policy, example: Example, base: bool = False) -> None:
        self.policy, self.base = policy, base
        with self._measured() as seen:
            self.conditioning = dict(policy.encode([example]))
        self.encoding = max(seen.bytes)
        """The peak of encoding."""
        self.decode_batch = policy.decode_batch(self.conditioning)
        self.shape = policy.latent_shape(self.conditioning)
        self.latent_bytes = 4 * self.shape[0] * self.shape[1]
        self.conditioning_bytes = size_of(self.conditioning.values())
        """This and `latent_bytes` are those of one row."""
        self.picture_bytes = 0
        self._velocity(*self._inputs(1))  # what libraries set up once does not belong to a pass

    def _measured(self) -> Moments:
        self.seen = Moments(self.policy.device)
        """The moments of the last pass."""
        return self.seen

    def _inputs(self, count: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        device = self.policy.device
        latents, sigma = torch.zeros(count, *self.shape, device=device), torch.full((count,), 0.5, device=device)
        return latents, sigma, repeat(self.conditioning, count)

    def _velocity(self, *inputs: Any) -> Tensor:
        with torch.no_grad():
            return self.policy.velocity(*inputs)

    def learn(self, count: int) -> list[int]:
        """Forward and backward, with gradients already allocated."""
        inputs, parameters = self._inputs(count), self.policy.trainable_parameters()
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        with self._measured() as seen:
            if self.base:
                with self.policy.base():
                    self._velocity(*inputs)
            velocity = self.policy.velocity(*inputs)
            loss = velocity.square().mean()
            self.backward = len(seen.bytes)
            """Index of the moment where the backward pass begins."""
            loss.backward()
        for parameter in parameters:
            parameter.grad = None
        return seen.bytes

    def forward(self, count: int) -> list[int]:
        inputs = self._inputs(count)
        with self._measured() as seen:
            self._velocity(*inputs)
        return seen.bytes

    def decode(self, count: int) -> list[int]:
        latents, _, conditioning = self._inputs(count)
        with self._measured() as seen:
            images = self.policy.decode(latents, conditioning)
        self.picture_bytes = size_of([images]) // count
        return seen.bytes


# ---- what is counted


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state, from one step on meta tensors. If it cannot step on these, two float32 for each
    parameter, as AdamW keeps."""
    groups = [{**group, "params": [_empty(p) for p in group["params"]]} for group in optimizer.param_groups]
    try:
        empty: Any = type(optimizer)(groups)  # pyright: ignore[reportCallIssue]
        empty.step()
        return size_of(_state(empty))
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return sum(2 * 4 * p.numel() for group in groups for p in group["params"])


def _empty(parameter: Tensor) -> nn.Parameter:
    empty = nn.Parameter(torch.empty_like(parameter, device="meta"))
    empty.grad = torch.empty_like(empty)
    return empty


def _state(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))


def modules(things: Sequence[object], depth: int = 3) -> list[nn.Module]:
    """The modules among things and, down to `depth`, among their attributes and the components of pipelines."""
    found = [thing for thing in things if isinstance(thing, nn.Module)]
    inside: list[object] = []
    for thing in things:
        if not isinstance(thing, nn.Module) and hasattr(thing, "__dict__"):
            inside += [*vars(thing).values(), *getattr(thing, "components", {}).values()]
    return found + (modules(inside, depth - 1) if inside and depth else [])


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors, each counted once. A quantised tensor counts with its parts."""
    return sum({storage._cdata: storage.nbytes() for storage in _storages(list(tensors))}.values())


def _tensors(module: nn.Module, device: torch.device) -> list[Tensor]:
    return [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.device == device]


def _storages(values: Sequence[Any]) -> Iterator[torch.UntypedStorage]:
    for value in values:
        if hasattr(value, "__tensor_flatten__"):
            yield from _storages([getattr(value, name) for name in value.__tensor_flatten__()[0]])
        elif isinstance(value, Tensor):
            yield value.untyped_storage()


def in_use(device: torch.device) -> int:
    """Bytes that PyTorch has allocated on the GPU, or that the process holds in memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss
