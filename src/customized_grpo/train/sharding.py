"""Sharding with FSDP2: each process keeps a part of every weight, and of its gradient and optimizer state.

A pass of a sharded transformer collects weights from all processes, so all of them take the same number of passes
(`in_step`). The average and the old policy are copies of a process's own parts. Checkpoints hold whole tensors, so a
run goes on with any number of processes: `whole` collects them, `sharded_like` takes a process's own part.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_map

from customized_grpo.distributed import FailedElsewhere, peers
from customized_grpo.errors import UserError
from customized_grpo.policies.contract import Policy


def shard(policy: Policy, sharding: str, accelerator: Accelerator) -> None:
    """Share the weights of `policy.module` out over all processes: block by block, then the rest.

    Args:
        policy: not sharded yet, or nothing happens.
        sharding: `training.sharding`.
        accelerator: of the run.

    Raises:
        UserError: for quantised weights, or a transformer that `policy.offload` moves as a whole.
    """
    if sharding == "none" or is_sharded(policy):
        return
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
    from torch.distributed.tensor import Shard

    if getattr(policy, "offload", "none") == "swap":
        raise UserError(
            f"training.sharding is {sharding}, and policy.offload=swap moves the whole transformer off the device; set "
            f"policy.offload=cpu, or training.sharding=none."
        )
    for name, parameter in policy.module.named_parameters():
        if type(parameter.data) is not Tensor or not parameter.is_floating_point():
            raise UserError(
                f"training.sharding is {sharding}, and {name} is quantised, which cannot be sharded; set "
                f"policy.quantize=none or training.sharding=none."
            )
    if not distributed.is_initialized():  # one process, which may still keep its weights on the host
        distributed.init_process_group(store=distributed.HashStore(), rank=0, world_size=1)
    count, on_gpu = accelerator.num_processes, policy.device.type == "cuda"

    def placement(parameter: nn.Parameter) -> Shard | None:
        """Along the first dimension that divides evenly, such as the long one of an adapter of low rank."""
        return next((Shard(dim) for dim, size in enumerate(parameter.shape) if size % count == 0), None)

    half = policy.dtype == torch.bfloat16
    settings: dict[str, Any] = {
        "mesh": distributed.init_device_mesh(policy.device.type, (count,)),
        "reshard_after_forward": True,  # so that parameters are this process's part whenever no pass is running
        "shard_placement_fn": placement,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=on_gpu) if sharding == "fsdp2_offload" else OffloadPolicy(),
    }
    # Blocks that return a part of a tensor: nothing here or in diffusers changes it in place, which would be wrong.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(\w+\) returned a view")
    for stack in policy.module.children():
        for block in stack if isinstance(stack, nn.ModuleList) else ():
            fully_shard(block, **settings)
    fully_shard(policy.module, **settings)
    vars(policy)["processes"] = distributed.new_group(backend="gloo")  # `in_step` talks on the host


def is_sharded(policy: Policy) -> bool:
    return "processes" in vars(policy)


DONE, PASS, BASE, LEARN, FAILED = range(5)
"""What a process does next: nothing, a pass without gradient, one of the base policy, one with gradient; or fail."""


@contextmanager
def in_step(policy: Policy) -> Iterator[None]:
    """Inside it all processes take equally many passes of a sharded policy, with the same weights.

    Before every pass they tell each other what comes next. A process with fewer passes repeats its last one, without
    effect: its gradients are zero. One that fails between passes ends the others too. One that fails in a pass, or
    before its backward pass, leaves the others waiting, so it must end alone (see `fail_together`).
    """
    if not is_sharded(policy):
        yield
        return
    step = _Step(policy)
    replaced = {"velocity": step.velocity, "base": step.base, "settle": step.settle}
    vars(policy).update(replaced)
    try:
        with peers(sure=False):
            yield
            step.settle()
    except FailedElsewhere:
        raise
    except Exception as error:
        if step.last == LEARN:
            vars(error)["alone"] = True
        else:
            step.tell(FAILED)
        raise
    finally:
        for name in replaced:
            del vars(policy)[name]


class _Step:
    """The passes of this process among those of all."""

    def __init__(self, policy: Policy) -> None:
        self.group = vars(policy)["processes"]
        self.pass_once, self.as_base = policy.velocity, policy.base
        self.inputs, self.in_base, self.last = (), False, DONE

    def tell(self, action: int) -> int:
        """What comes next, agreed by all."""
        everyone = torch.tensor(action)
        distributed.all_reduce(everyone, distributed.ReduceOp.MAX, group=self.group)
        if everyone == FAILED and action != FAILED:
            raise FailedElsewhere
        return int(everyone)

    def velocity(self, *inputs: Any) -> Tensor:
        action = LEARN if torch.is_grad_enabled() else BASE if self.in_base else PASS
        self.tell(action)
        self.inputs, self.last = inputs, LEARN  # for as long as the pass takes
        velocity = self.pass_once(*inputs)
        self.last = action
        return velocity

    @contextmanager
    def base(self) -> Iterator[None]:
        self.in_base = True
        try:
            with self.as_base():
                yield
        finally:
            self.in_base = False

    def settle(self) -> None:
        """Repeat the last pass until all processes are done, so that they change their weights at the same time."""
        while not self.in_base and (action := self.tell(DONE)) != DONE:
            with torch.set_grad_enabled(action == LEARN), self.base() if action == BASE else nullcontext():
                velocity = self.pass_once(*self.inputs)
            if action == LEARN:
                velocity.backward(torch.zeros_like(velocity))


# ---- whole tensors and their parts


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; all processes call it. Other tensors are returned as they are."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    with peers():
        return tensor.full_tensor()  # pyright: ignore[reportAttributeAccessIssue] - a DTensor


def own(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; other tensors are returned as they are."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore[reportAttributeAccessIssue]


def whole(tree: Any, accelerator: Accelerator) -> Any:
    """Sharded tensors in nested containers as whole ones on the CPU of the main process; None on the others.

    All processes call it. One tensor after the other is collected, so that only one is whole on a device.
    """

    def collect(leaf: Any) -> Any:
        if not hasattr(leaf, "full_tensor"):
            return leaf
        tensor = full(leaf)
        return tensor.cpu() if accelerator.is_main_process else None

    return tree_map(collect, tree)


def sharded_like(tensor: Tensor, like: Tensor | None) -> Tensor:
    """This process's part of a whole tensor, sharded as `like` is; the tensor itself if `like` is not or has another
    shape."""
    if like is None or not hasattr(like, "full_tensor") or like.shape != tensor.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def holding(policy: Policy, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside it the module of a sharded policy has whole trained weights, for the main process to write.

    They have the names of its parameters. No pass may run.
    """
    module, sharded = policy.module, type(policy.module)
    kept = {name: parameter for name, parameter in module.named_parameters() if name in weights}
    module.__class__ = sharded.__mro__[2]  # the class before `fully_shard`, whose name is written too
    try:
        _put(module, {name: nn.Parameter(weights[name]) for name in kept})
        yield
    finally:
        _put(module, kept)
        module.__class__ = sharded


def _put(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        home, _, leaf = name.rpartition(".")
        module.get_submodule(home).register_parameter(leaf, parameter)
