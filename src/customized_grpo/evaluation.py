"""Held-out evaluation: fixed examples, fixed noise, deterministic sampling, so that numbers pair over training."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor

from customized_grpo.distributed import fail_together, gather_objects
from customized_grpo.errors import UserError
from customized_grpo.memory import explain_full_device
from customized_grpo.policies.contract import Policy
from customized_grpo.randomness import normal, seed_global
from customized_grpo.report.intervals import Change, change
from customized_grpo.report.record import Evaluation as Scores
from customized_grpo.report.record import read_evaluation
from customized_grpo.rollout import sample_ode
from customized_grpo.scoring import RewardFunction, score
from customized_grpo.settings import Role, Settings
from customized_grpo.store import write
from customized_grpo.types import Example, ScoreTable


class EvaluationSettings(Settings):
    """What is measured on held-out examples, before, during and after training."""

    every: Annotated[int, Role.APPLIED] = Field(default=10, ge=0)
    """Iterations between two evaluations; 0 evaluates only before and after."""
    examples: Annotated[int, Role.KEPT] = Field(default=48, ge=0)
    """Held-out examples, from the start of the evaluation data; 0 switches evaluation off."""
    replicates: Annotated[int, Role.KEPT] = Field(default=2, ge=1)
    """Pictures per example, each from its own fixed noise."""
    seed: Annotated[int, Role.KEPT] = 0
    """Of the fixed noise, apart from the run's seed so that runs pair."""
    batch: Annotated[int, Role.RUNTIME] = Field(default=48, ge=1)
    """Pictures sampled at once."""
    grid_rows: Annotated[int, Role.RUNTIME] = Field(default=8, ge=0)
    """Examples shown in the sample grids."""
    base: Annotated[Path | None, Role.KEPT] = None
    """An evaluation of the base policy on the same tasks with the same noise, to take in place of the one before
    training: runs that are compared need only one."""


@dataclass(frozen=True)
class Evaluation:
    """Scores and pictures of one policy state."""

    iteration: int
    values: Tensor
    """(replicates, tasks, metrics) float32; NaN where a metric could not score."""
    metrics: tuple[str, ...]
    rewards: tuple[str, ...]
    """Those of `metrics` that are trained on."""
    examples: tuple[Example, ...]
    images: Tensor
    """(rows, 3, H, W) first replicate of the first `grid_rows` tasks."""

    def table(self) -> ScoreTable:
        return ScoreTable(
            self.values.double(),
            self.metrics,
            tuple(example.id for example in self.examples),
            tuple(cluster(example) for example in self.examples),
        )

    def scores(self) -> Scores:
        """As the file that `save` writes is read: the numbers, without pictures."""
        tasks, subjects = tuple(e.id for e in self.examples), tuple(map(cluster, self.examples))
        values = self.values.double().cpu().numpy()
        return Scores(self.iteration, self.metrics, self.rewards, tasks, subjects, values)

    def means(self) -> dict[str, float]:
        """Mean of each metric over what could be scored."""
        return {name: float(self.values[..., k].double().nanmean()) for k, name in enumerate(self.metrics)}

    def summary(self) -> str:
        """The means in one line, each with how many pictures could not be scored."""
        missing = self.values.isnan().flatten(0, 1).sum(dim=0).tolist()
        total = self.values[..., 0].numel()
        return "  ".join(
            f"{name} {value:.3f}" + (f" ({count} of {total} unscored)" if count else "")
            for (name, value), count in zip(self.means().items(), missing, strict=True)
        )

    def save(self, path: Path) -> None:
        """JSON with every score: {"iteration", "metrics", "rewards", "tasks", "values": [replicate][task][metric]}."""
        tasks = [{"id": e.id, "subject": cluster(e), "prompt": e.prompt} for e in self.examples]
        values = [[[None if v != v else v for v in row] for row in rep] for rep in self.values.tolist()]
        payload = {
            "iteration": self.iteration, "metrics": self.metrics, "rewards": self.rewards, "tasks": tasks,
            "values": values,
        }  # fmt: skip
        write(path, json.dumps(payload))


def reuse(path: Path, examples: Sequence[Example], metrics: Sequence[str], replicates: int) -> Evaluation:
    """The evaluation of the base policy that another run, or `cgrpo eval`, left at `path`, without pictures.

    Raises:
        UserError: if it is missing, damaged, or of other tasks or metrics.
    """
    advice = "make it with `cgrpo eval CONFIG --output FOLDER`, or leave evaluation.base out."
    try:
        found = read_evaluation(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"evaluation.base: '{path}' is missing or damaged ({type(error).__name__}); {advice}"
        ) from error
    same = found.tasks == tuple(e.id for e in examples) and found.metrics == tuple(metrics)
    if not same or len(found.values) != replicates:
        raise UserError(f"evaluation.base: '{path}' is of other tasks, metrics or replicates than this run; {advice}")
    values = torch.from_numpy(found.values).float()
    return Evaluation(found.iteration, values, found.metrics, found.rewards, tuple(examples), torch.empty(0))


def cluster(example: Example) -> str:
    """Whose picture it is: intervals resample subjects, because pictures of one subject are alike."""
    return str(getattr(example, "subject_id", "") or example.subject or example.id)


@torch.no_grad()
def evaluate(
    policy: Policy,
    examples: Sequence[Example],
    rewards: Mapping[str, RewardFunction],
    metrics: Mapping[str, RewardFunction],
    settings: EvaluationSettings,
    num_inference_steps: int,
    iteration: int,
    accelerator: Accelerator | None = None,
) -> Evaluation:
    """Score what the policy draws for `examples` from noise that depends on (seed, example, replicate) alone.

    With an accelerator the batches are shared out over its processes, and every process gets the whole result.
    """
    measured = {**rewards, **metrics}
    scored: dict[tuple[int, int], list[float]] = {}
    shown: dict[int, Tensor] = {}
    tasks = [(replicate, index) for index in range(len(examples)) for replicate in range(settings.replicates)]
    size = settings.batch // settings.replicates * settings.replicates or settings.batch  # metrics see whole groups
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    with fail_together(accelerator), explain_full_device(policy.device, "evaluation"):
        for batch in batches(policy, examples, tasks, size)[rank::world]:
            chosen = [examples[index] for _, index in batch]
            seed_global("evaluation", settings.seed, chosen[0].id, batch[0][0])
            conditioning = policy.encode(chosen)
            keys = [("evaluation", settings.seed, examples[i].id, r) for r, i in batch]
            noise = normal(policy.latent_shape(conditioning), keys)
            images = sample_ode(policy, conditioning, noise, num_inference_steps)
            scores = score(images, chosen, measured)
            for row, (replicate, index) in enumerate(batch):
                scored[replicate, index] = scores[row].tolist()
                if replicate == 0 and index < settings.grid_rows:
                    shown[index] = images[row].cpu()
    if accelerator is not None:
        for other_scored, other_shown in gather_objects(accelerator, (scored, shown)):
            scored, shown = {**scored, **other_scored}, {**shown, **other_shown}
    values = torch.tensor([[scored[r, i] for i in range(len(examples))] for r in range(settings.replicates)])
    pictures = torch.stack([shown[i] for i in sorted(shown)]) if shown else torch.empty(0)
    return Evaluation(iteration, values, tuple(measured), tuple(rewards), tuple(examples), pictures)


def batches(
    policy: Policy, examples: Sequence[Example], tasks: Sequence[tuple[int, int]], size: int
) -> list[list[tuple[int, int]]]:
    """(replicate, example index) tasks in batches whose examples can be encoded together."""
    by_shape: dict[Any, list[tuple[int, int]]] = {}
    for task in tasks:
        by_shape.setdefault(policy.shape_key(examples[task[1]]), []).append(task)
    return [group[i : i + size] for group in by_shape.values() for i in range(0, len(group), size)]


def changes(before: Scores, after: Scores) -> list[Change]:
    """What training did to every metric that was measured both times, on the tasks they share."""
    shared = [metric for metric in before.metrics if metric in after.metrics]
    return [found for metric in shared if (found := change(before, after, metric)).tasks]
