"""Held-out evaluation with fixed examples, fixed noise and deterministic sampling, so that scores are comparable."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from customized_grpo.data.images import resized, to_pil
from customized_grpo.distributed import fail_together, gather_objects
from customized_grpo.errors import UserError
from customized_grpo.page.images import jpeg
from customized_grpo.policies.contract import Policy, batches
from customized_grpo.randomness import normal, seed_global
from customized_grpo.rewards.scoring import RewardFunction, score
from customized_grpo.shell import command
from customized_grpo.store.scores import IDENTITY, Change, Scores, change, read_scores
from customized_grpo.structures import Example
from customized_grpo.train.memory import explain_full_device
from customized_grpo.train.rollout import sample_ode
from customized_grpo.train.settings import EvaluationSettings
from customized_grpo.train.sharding import in_step, is_sharded


@dataclass(frozen=True)
class Evaluation:
    """Scores of one policy state, and some of the images."""

    scores: Scores
    examples: tuple[Example, ...]
    """Those whose images are kept, of their first replicate: all, or none if `grid_rows` is 0."""
    images: Tensor
    """(rows, 3, H, W) of the first `grid_rows`; empty where the scores are another run's."""
    marks: tuple[dict[str, bool], ...] = ()
    """Per example what a metric with a method `marks(images, examples)` says is right and wrong in its image."""
    small: tuple[bytes, ...] = ()
    """Of the examples after them, small JPEG files, among which a report chooses."""


def reuse(path: Path, examples: Sequence[Example], metrics: Sequence[str], replicates: int) -> Evaluation:
    """The evaluation of the base policy that another run, or `cgrpo eval`, left at `path`, without images.

    Raises:
        UserError: if it is missing, damaged, or of other tasks or metrics.
    """
    advice = f"create it with `{command('eval', 'CONFIG', '--output', 'FOLDER')}`, or remove evaluation.base."
    try:
        found = read_scores(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"evaluation.base: '{path}' is missing or damaged ({type(error).__name__}); {advice}"
        ) from error
    same = found.tasks == tuple(example.id for example in examples) and found.metrics == tuple(metrics)
    if not same or len(found.values) != replicates:
        raise UserError(f"evaluation.base: '{path}' has other tasks, metrics or replicates than this run; {advice}")
    scores = tabulate(found.values, examples, found.metrics, found.rewards, found.iteration)
    return Evaluation(replace(scores, permitted=found.permitted), (), torch.empty(0))


def tabulate(
    values: np.ndarray, examples: Sequence[Example], metrics: Iterable[str], rewards: Iterable[str], iteration: int
) -> Scores:
    """The table of (replicates, tasks, metrics) values whose tasks are `examples`."""
    return Scores(
        values, tuple(metrics), tuple(rewards),
        tasks=tuple(example.id for example in examples),
        subjects=tuple(map(cluster, examples)),
        kinds=tuple(str(getattr(example, "kind", None) or "") for example in examples),
        prompts=tuple(example.prompt for example in examples),
        iteration=iteration,
    )  # fmt: skip


def cluster(example: Example) -> str:
    """The subject of an example. Intervals resample subjects, because images of one subject are alike."""
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

    With an accelerator the batches are shared out over its processes, and every process gets the whole result. For the
    base policy, metrics of identity also score the examples' targets.
    """
    measured = {**rewards, **metrics}
    scored: dict[tuple[int, int], list[float]] = {}
    permitted: dict[int, list[float]] = {}
    shown: dict[int, tuple[Tensor | bytes, dict[str, bool]]] = {}
    marking = [metric.marks for metric in measured.values() if hasattr(metric, "marks")]  # pyright: ignore[reportFunctionMemberAccess]
    tasks = [(replicate, index) for index in range(len(examples)) for replicate in range(settings.replicates)]
    size = settings.batch // settings.replicates * settings.replicates or settings.batch  # metrics see whole groups
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    used = policy.sampled_with(**settings.of_policy())
    every = batches(policy, tasks, size, lambda task: examples[task[1]])
    mine = every[rank::world] or (every[:1] if is_sharded(policy) else [])  # which needs every process in its passes
    with fail_together(accelerator), in_step(policy), explain_full_device(policy.device, "evaluation"), used:
        for batch in mine:
            chosen = [examples[index] for _, index in batch]
            seed_global("evaluation", settings.seed, chosen[0].id, batch[0][0])
            conditioning = policy.encode(chosen)
            keys = [("evaluation", settings.seed, examples[i].id, r) for r, i in batch]
            noise = normal(policy.latent_shape(conditioning), keys)
            images = sample_ode(policy, conditioning, noise, num_inference_steps, settings.solver)
            scores = score(images, chosen, measured)
            for row, (replicate, index) in enumerate(batch):
                scored[replicate, index] = scores[row].tolist()
                if replicate == 0 and settings.grid_rows:
                    picture, example = images[row : row + 1], examples[index]
                    marks = {name: right for mark in marking for name, right in mark(picture, [example])[0].items()}
                    large = index < settings.grid_rows
                    shown[index] = picture[0].cpu() if large else jpeg(to_pil(picture[0])), marks
            targets = [i for replicate, i in batch if replicate == 0 and iteration == 0 and examples[i].target]
            if targets:
                found = _score_targets([examples[i] for i in targets], measured, images)
                permitted |= dict(zip(targets, found.tolist(), strict=True))
    if accelerator is not None:
        for other_scored, other_shown, other_permitted in gather_objects(accelerator, (scored, shown, permitted)):
            scored, shown = {**scored, **other_scored}, {**shown, **other_shown}
            permitted = {**permitted, **other_permitted}
    values = np.array([[scored[r, i] for i in range(len(examples))] for r in range(settings.replicates)])
    kept, marks = zip(*(shown[i] for i in sorted(shown)), strict=True) if shown else ((), ())
    large, small = kept[: settings.grid_rows], kept[settings.grid_rows :]
    images = torch.stack(large) if large else torch.empty(0)
    table = tabulate(values, examples, measured, rewards, iteration)
    if permitted:
        unknown = [np.nan] * len(measured)
        table = replace(table, permitted=np.array([permitted.get(i, unknown) for i in range(len(examples))]))
    return Evaluation(table, tuple(examples) if shown else (), images, marks, small)


def _score_targets(examples: Sequence[Example], measured: Mapping[str, RewardFunction], images: Tensor) -> Tensor:
    """(B, metrics) what metrics of identity say of the targets at the size of `images`; NaN in other metrics."""
    pictures = [resized(example.target, *images.shape[-2:]) for example in examples if example.target]
    found = torch.full((len(pictures), len(measured)), torch.nan)
    columns = {n: {name: measured[name]} for n, name in enumerate(measured) if IDENTITY.search(name)}
    for n, one in columns.items():
        found[:, [n]] = score(torch.stack(pictures).to(images), examples, one)
    return found


def changes(before: Scores, after: Scores) -> list[Change]:
    """The change of every metric that was measured both times, over the shared tasks."""
    shared = [metric for metric in before.metrics if metric in after.metrics]
    return [found for metric in shared if (found := change(before, after, metric)).tasks]
