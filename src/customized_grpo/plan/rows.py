"""Count the rows that pass through the models in one iteration, by running the objective on a tiny policy."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from customized_grpo.functional.schedule import shifted_sigmas
from customized_grpo.policies.contract import Policy
from customized_grpo.structures import Conditioning, Example
from customized_grpo.train.meters import Meter
from customized_grpo.train.objectives import make_objective
from customized_grpo.train.rollout import RowNoise
from customized_grpo.train.settings import TrainerConfig
from customized_grpo.train.update import micro_batches

TRIED = 10
"""How many iterations are counted, because the trained steps may change during a run."""


class RowCounts(NamedTuple):
    """Rows of one process in the mean iteration."""

    sampled: float
    """Transformer passes of the rollout, one for each row."""
    decoded: float
    """Decoded images."""
    trained: float
    """Passes of the update with a backward pass."""
    frozen: float
    """Passes of the update without a backward pass: of the base policy or an old one, or to recompute log-probs."""


class _OneNumber(Policy):
    """A policy whose latents are one number, and which counts the rows of every call."""

    def __init__(self) -> None:
        self.module: nn.Module = nn.Linear(1, 1, bias=False)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.rows: Counter[str] = Counter()

    def encode(self, examples: Sequence[Example]) -> Conditioning:
        return {"one": torch.zeros(len(examples), 1)}

    def latent_shape(self, conditioning: Conditioning) -> tuple[int, int]:
        return 1, 1

    def sigmas(self, num_inference_steps: int, conditioning: Conditioning) -> Tensor:
        return shifted_sigmas(num_inference_steps, 3.0)

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        self.rows["trained" if torch.is_grad_enabled() else "frozen"] += len(latents)
        return self.module(latents)

    def decode(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        self.rows["decoded"] += len(latents)
        return torch.zeros(len(latents), 3, 1, 1)

    @contextmanager
    def base(self) -> Iterator[None]:
        yield

    def trainable_state(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.module.named_parameters()}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        pass

    def save(self, folder: Path) -> None:
        pass


def count_rows(config: TrainerConfig, processes: int) -> RowCounts:
    """Count the rows of a configuration whose prompts are divided among processes."""
    training = config.training.model_copy(update={"micro_batch": None})  # in as few passes as there can be
    policy = _OneNumber()
    objective = make_objective(policy, config.model_copy(update={"training": training}))
    prompts, groups = training.prompts_per_iteration // processes, config.rollout.num_generations  # all prompts alike
    tried = sorted({1 + n * training.iterations // TRIED for n in range(TRIED)})
    tried = [n for n in tried if n <= training.iterations]

    def count(iteration: int) -> Counter[str]:
        policy.rows.clear()
        plan, noise = objective.plan(iteration), RowNoise(0, iteration, [0], groups)
        rollout = objective.collect({"one": torch.zeros(1, 1)}, plan, noise, lambda name: nullcontext())
        sampled, columns = policy.rows.pop("frozen"), list(range(len(plan.progress)))
        rollouts = objective.prepare([rollout], columns[:: training.updates_per_epoch])
        advantage = torch.zeros(len(rollout), len(columns))
        for _ in range(training.inner_epochs):
            for batch in micro_batches(rollouts, advantage, columns, None, first=True):
                objective.loss(batch, Meter())
        return policy.rows + Counter(sampled=sampled)

    count(1)  # in the first update of a run more is checked than in the others
    total = sum((count(iteration) for iteration in tried), Counter[str]())
    return RowCounts(**{name: total[name] * prompts / len(tried) for name in RowCounts._fields})
