"""Drawing and scoring. Everything is on disk as soon as it is done, and nothing is done twice."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from PIL import Image

from customized_grpo.assemble import build_reward
from customized_grpo.data.decode import read_picture
from customized_grpo.data.images import to_pil, to_tensor
from customized_grpo.policies.contract import Policy
from customized_grpo.randomness import normal, seed_global
from customized_grpo.rewards.scoring import RewardFunction, score
from customized_grpo.structures import Example
from customized_grpo.studies.bench.protocols import Metric
from customized_grpo.studies.bench.record import BenchFolder, Job
from customized_grpo.studies.bench.suites import Suite
from customized_grpo.train.rollout import sample_ode

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""
T = TypeVar("T")


def all_jobs(suite: Suite, images: int) -> list[Job]:
    """Every picture of a bench."""
    return [(task, n) for task in suite.tasks for n in range(images)]


def undrawn(folder: BenchFolder, jobs: Iterable[Job]) -> list[Job]:
    """Those without a PNG."""
    return [job for job in jobs if not folder.image(job).is_file()]


@torch.no_grad()
def draw(
    policy: Policy, suite: Suite, jobs: Sequence[Job], folder: BenchFolder, *, seed: int, num_inference_steps: int,
    batch: int, progress: Progress,
) -> None:  # fmt: skip
    """Draw the pictures that are not there, from noise that depends on (seed, task, image) alone."""
    missing = undrawn(folder, jobs)
    done = len(jobs) - len(missing)
    progress("draw", done, len(jobs))
    shown = ((job, suite.shown(job[0])) for job in missing)
    for group in grouped(shown, lambda pair: policy.shape_key(pair[1]), batch):
        examples = [example for _, example in group]
        conditioning = policy.encode(examples)
        keys = [("bench", seed, task.id, n) for (task, n), _ in group]
        seed_global(*keys[0])
        noise = normal(policy.latent_shape(conditioning), keys)
        images = sample_ode(policy, conditioning, noise, num_inference_steps)
        for ((task, n), _), image in zip(group, images, strict=True):
            folder.save_image((task, n), to_pil(image))
        done += len(group)
        progress("draw", done, len(jobs))


def save_references(suite: Suite, folder: BenchFolder) -> None:
    """What the policy was shown, once for each subject, for the report."""
    firsts = {task.subject: task for task in reversed(suite.tasks)}
    for subject, task in firsts.items():
        if not folder.reference(subject, 0).is_file():
            for n, picture in reversed(list(enumerate(suite.shown(task).references))):
                small = picture.convert("RGB")
                small.thumbnail((512, 512))
                folder.save_reference(subject, n, small)


def score_images(
    name: str, metric: Metric, reward: RewardFunction, suite: Suite, jobs: Sequence[Job], folder: BenchFolder, *,
    part: int, batch: int, progress: Progress,
) -> None:  # fmt: skip
    """Score the PNG files that have no score by this metric yet."""
    known = folder.score_lines(name)
    missing = [(task, n) for task, n in jobs if (task.id, n) not in known]
    done = len(jobs) - len(missing)
    progress(name, done, len(jobs))
    examples: dict[str, Example] = {}  # the pictures of a task share one, so that its references are embedded once

    def opened() -> Iterator[tuple[Job, Image.Image, Example]]:
        for job in missing:
            task = job[0]
            if task.id not in examples:
                examples.clear()
                examples[task.id] = _against(metric, suite.compared(task), suite.shown(task))
            yield job, read_picture(folder.image(job))[0], examples[task.id]

    for group in grouped(opened(), lambda row: row[1].size, batch):
        images = torch.stack([to_tensor(image) for _, image, _ in group])
        (task, n), *_ = group[0]
        seed_global("score", task.id, n)
        values = score(images, [example for *_, example in group], {name: reward})[:, 0].tolist()
        folder.add_scores(name, part, [(job, value) for (job, *_), value in zip(group, values, strict=True)])
        done += len(group)
        progress(name, done, len(jobs))


def score_oracle(
    name: str, metric: Metric, reward: RewardFunction, suite: Suite, folder: BenchFolder, progress: Progress
) -> None:
    """Score every true picture against the others of its subject; prompts are only known of drawn truths."""
    found: list[tuple[str, str, float]] = []
    for number, real in enumerate(suite.real(), start=1):
        compared = real.shown if metric.role == "copy" else real.compared
        if compared is not None and (metric.role != "prompt" or compared.prompt):
            seed_global("oracle", real.name)
            value = score(to_tensor(real.image).unsqueeze(0), [compared], {name: reward})
            found.append((real.subject, real.name, float(value[0, 0])))
        progress(f"oracle {name}", number, 0)
    folder.save_oracle(name, found)


@contextmanager
def loaded(metric: Metric) -> Iterator[RewardFunction]:
    """The metric's model, in memory only inside: a large judge then has the machine for itself."""
    reward = build_reward(metric.spec, "metric")
    try:
        yield reward
    finally:
        close = getattr(reward, "close", None)
        if callable(close):
            close()
        del reward
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure_oracle(metrics: Mapping[str, Metric], suite: Suite, folder: BenchFolder, progress: Progress) -> None:
    """The oracle line of every metric that has none yet. All metrics are loaded, so a wrong path fails at the start."""
    for name, metric in metrics.items():
        if folder.oracle_scores(name) is None:
            with loaded(metric) as reward:
                score_oracle(name, metric, reward, suite, folder, progress)


def measure_images(
    metrics: Mapping[str, Metric], suite: Suite, jobs: Sequence[Job], folder: BenchFolder, *, part: int, batch: int,
    progress: Progress,
) -> None:  # fmt: skip
    """All metrics on the given pictures, one metric after the other."""
    for name, metric in metrics.items():
        known = folder.score_lines(name)
        if any((task.id, n) not in known for task, n in jobs):
            with loaded(metric) as reward:
                score_images(name, metric, reward, suite, jobs, folder, part=part, batch=batch, progress=progress)


def grouped(rows: Iterable[T], key: Callable[[T], Any], size: int) -> Iterator[list[T]]:
    """Neighbours with equal keys, at most `size` together."""
    for _, group in itertools.groupby(rows, key):
        while some := list(itertools.islice(group, size)):
            yield some


def _against(metric: Metric, compared: Example, shown: Example) -> Example:
    return shown if metric.role == "copy" else compared
