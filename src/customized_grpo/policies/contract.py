"""What a model family must offer to be trained: `Policy`, and `check_policy` that proves it does."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from customized_grpo.errors import UserError
from customized_grpo.structures import Conditioning, Example

T = TypeVar("T")

METADATA = "training.json"
"""What training writes beside a saved adapter: its iteration, and its held-out worst-reward gain if that is known."""


class Policy(ABC):
    """A reference-conditioned flow-matching generator with something in it to train.

    `sigma` in [0, 1] is the share of noise and the only noise coordinate outside a policy.
    """

    module: nn.Module
    """The network that `velocity` calls and whose parameters with `requires_grad` train."""

    device: torch.device
    """Where it computes. Conditioning, latents and pictures live there too."""

    dtype: torch.dtype
    """Of the forward pass: float32, or bfloat16 under autocast. Latents and velocities are float32 in any case."""

    step_distilled: bool = False
    """Whether the model was distilled to few sampling steps."""

    @abstractmethod
    def encode(self, examples: Sequence[Example]) -> Conditioning:
        """Prompts and references as tensors with leading axis len(examples), without gradient.

        The examples share one `shape_key`. Raises UserError for an example that the family cannot take.
        """

    def encode_ahead(self, examples: Sequence[Example]) -> None:  # noqa: B027
        """Called before examples are encoded batch by batch, for what is cheaper to do for all of them at once."""

    def shape_key(self, example: Example) -> Hashable:
        """Examples with equal keys can be encoded into one batch."""
        return tuple(image.size for image in example.references)

    @abstractmethod
    def latent_shape(self, conditioning: Conditioning) -> tuple[int, int]:
        """(N, C) of the latents that this conditioning asks for."""

    def initial_latents(self, conditioning: Conditioning, noise: Tensor) -> Tensor:
        """Latents at sigma = 1 from standard normal noise, both (B, N, C)."""
        return noise

    @abstractmethod
    def sigmas(self, num_inference_steps: int, conditioning: Conditioning) -> Tensor:
        """The schedule, shape (T + 1,), float32, from 1 down to exactly 0. Training and inference use this one."""

    @abstractmethod
    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """d latents / d sigma, shape (B, N, C) float32, for latents (B, N, C) float32 and sigma (B,)."""

    @abstractmethod
    def decode(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        """Images (B, 3, H, W), float32 in [0, 1], without gradient."""

    def decode_batch(self, conditioning: Conditioning) -> int | None:
        """Pictures that `decode` works on at once, for the estimate of memory; None is all."""
        return None

    @abstractmethod
    def base(self) -> AbstractContextManager[None]:
        """Inside it `velocity` is that of the base policy: the same weights with the adapter switched off."""

    def keep_base(self) -> bool:
        """Called before training where `base` will be needed: keep a copy of weights that training overwrites.

        Returns:
            Whether there is such a copy, which `base` puts in place of the trained weights.
        """
        return False

    @contextmanager
    def sampled_with(self, **settings: float | None) -> Iterator[None]:
        """Inside it images are sampled with other settings of `EvaluationSettings.of_policy`; None is the policy's own.

        Raises:
            UserError: for one that the family does not take.
        """
        given = [name for name, value in settings.items() if value is not None]
        if given:
            raise UserError(f"evaluation.{given[0]} is set, which {self.name} does not take; remove it.")
        yield

    @abstractmethod
    def trainable_state(self) -> dict[str, Tensor]:
        """The trained tensors by name, exact, for a checkpoint: one for each of `trainable_parameters`."""

    @abstractmethod
    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `trainable_state`. Raises UserError if names or shapes are those of another model."""

    def settle(self) -> None:  # noqa: B027
        """Called before its weights are replaced by others as a whole; a sharded policy waits for all processes."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what a user takes away (a LoRA file, or a full module) in the format of the family's pipeline."""

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the optimizer is given, in a fixed order."""
        return [p for p in self.module.parameters() if p.requires_grad]

    @property
    def name(self) -> str:
        return type(self).__name__


def repeat(conditioning: Conditioning, times: int) -> dict[str, Tensor]:
    """Every row `times` times, next to each other: (P, ...) to (P * times, ...)."""
    return {key: value.repeat_interleave(times, dim=0) for key, value in conditioning.items()}


def rows(conditioning: Conditioning, index: slice | Tensor) -> dict[str, Tensor]:
    """The given rows of every tensor."""
    return {key: value[index] for key, value in conditioning.items()}


@contextmanager
def weights_replaced(policy: Policy, state: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Inside it the policy has other trained weights, which it may not change; None leaves its own."""
    if state is None:
        yield
        return
    own = {name: tensor.clone() for name, tensor in policy.trainable_state().items()}
    policy.settle()
    policy.load_trainable_state(state)
    try:
        yield
        policy.settle()
    finally:
        policy.load_trainable_state(own)


def batches(
    policy: Policy, items: Iterable[T], size: int, example_of: Callable[[Any], Example] = lambda item: item
) -> list[list[T]]:
    """Items in batches of at most `size` whose examples can be encoded together; by default items are examples."""
    by_shape: dict[Hashable, list[T]] = {}
    for item in items:
        by_shape.setdefault(policy.shape_key(example_of(item)), []).append(item)
    return [group[i : i + size] for group in by_shape.values() for i in range(0, len(group), size)]


@torch.no_grad()
def move_towards(average: Mapping[str, Tensor], state: Mapping[str, Tensor], share: float) -> None:
    """Move each tensor of an average by a share of its way to the one of the same name, all in one operation."""
    goals = [state[name].to(tensor.device) for name, tensor in average.items()]
    torch._foreach_lerp_(list(average.values()), goals, share)


def check_policy(policy: Policy, examples: Sequence[Example], *, num_inference_steps: int = 4) -> None:
    """Prove that a policy obeys the contract, on two or more examples that share a `shape_key`.

    Checks shapes and dtypes, the schedule, determinism, batch equivariance (a row's velocity does not depend on its
    neighbours), that sampling and training compute the same velocity, that the gradient reaches the trainable
    parameters and only those, and that their state goes out and in.

    Raises:
        UserError: naming the first property that does not hold.
    """

    def require(holds: bool, sentence: str) -> None:
        if not holds:
            raise UserError(f"{policy.name} breaks the policy contract: {sentence}")

    require(len(examples) >= 2, f"the check needs two examples or more, got {len(examples)}.")
    conditioning = policy.encode(examples)
    for key, value in conditioning.items():
        require(
            isinstance(value, Tensor) and value.shape[:1] == (len(examples),),
            f"encode()['{key}'] must be a tensor with leading axis {len(examples)}, "
            f"got {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}.",
        )
        require(not value.requires_grad, f"encode()['{key}'] carries a gradient; encode under torch.no_grad().")

    sigmas = policy.sigmas(num_inference_steps, conditioning)
    require(
        sigmas.shape == (num_inference_steps + 1,) and bool(sigmas[-1] == 0) and bool((sigmas.diff() < 0).all()),
        f"sigmas({num_inference_steps}) must be {num_inference_steps + 1} falling values that end in 0, got {sigmas}.",
    )

    shape = (len(examples), *policy.latent_shape(conditioning))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(policy.device)
    latents = policy.initial_latents(conditioning, noise)
    require(latents.shape == shape, f"initial_latents must have shape {shape}, got {tuple(latents.shape)}.")
    sigma = sigmas[1].to(policy.device).expand(len(examples))
    with torch.no_grad():
        velocity = policy.velocity(latents, sigma, conditioning)
        again = policy.velocity(latents, sigma, conditioning)
        alone = policy.velocity(latents[:1], sigma[:1], rows(conditioning, slice(0, 1)))
        images = policy.decode(latents, conditioning)
    require(
        velocity.shape == shape and velocity.dtype == torch.float32,
        f"velocity must be float32 of shape {shape}, got {velocity.dtype} of {tuple(velocity.shape)}.",
    )
    require(torch.equal(velocity, again), "velocity differs between two equal calls; switch dropout off.")
    tolerance = 1e-4 if policy.dtype == torch.float32 else 5e-2
    drift = float((alone - velocity[:1]).abs().max() / velocity.abs().max().clamp(min=1e-8))
    require(
        drift <= tolerance,
        f"a row's velocity changes by {drift:.1e} with its neighbours in the batch (allowed {tolerance:.0e}).",
    )
    require(
        images.ndim == 4 and images.shape[:2] == (len(examples), 3) and images.dtype == torch.float32,
        f"decode must give float32 images (B, 3, H, W), got {images.dtype} of {tuple(images.shape)}.",
    )
    require(float(images.min()) >= 0 and float(images.max()) <= 1, "decode must give images in [0, 1].")

    parameters = policy.trainable_parameters()
    require(len(parameters) > 0, "no parameter has requires_grad, so nothing would train.")
    training = policy.velocity(latents, sigma, conditioning)
    drift = float((training.detach() - velocity).abs().max() / velocity.abs().max().clamp(min=1e-8))
    require(
        drift <= tolerance,
        f"velocity with gradients differs from velocity without by {drift:.1e} (allowed {tolerance:.0e}), so sampling "
        f"and training would compute different log-probs.",
    )
    training.square().mean().backward()
    reached = sum(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in parameters)
    frozen = [name for name, p in policy.module.named_parameters() if not p.requires_grad and p.grad is not None]
    for p in parameters:
        p.grad = None
    state = {name: tensor.clone() for name, tensor in policy.trainable_state().items()}
    require(
        len(state) == len(parameters), f"trainable_state has {len(state)} tensors for {len(parameters)} parameters."
    )
    with torch.no_grad():
        for p in parameters:
            p.add_(1.0)
        policy.load_trainable_state(state)
    restored = all(torch.equal(tensor, state[name]) for name, tensor in policy.trainable_state().items())
    require(restored, "load_trainable_state does not bring back what trainable_state gave.")
    require(reached > 0, "the gradient of velocity reaches none of the trainable parameters.")
    require(not frozen, f"the gradient reaches frozen parameters, such as {frozen[:1]}.")
