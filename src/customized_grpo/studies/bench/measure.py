"""One process's share of a bench: generate images and score them. Finished work is on disk and is not repeated."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from customized_grpo.assemble import loaded_reward
from customized_grpo.data.decode import read_picture
from customized_grpo.data.images import to_pil, to_tensor
from customized_grpo.page import Progress
from customized_grpo.policies.contract import Policy
from customized_grpo.policies.pipeline import default_device
from customized_grpo.randomness import normal, seed_global
from customized_grpo.rewards.scoring import RewardFunction, score
from customized_grpo.structures import Example
from customized_grpo.studies.bench.plan import Plan
from customized_grpo.studies.bench.protocols import Metric
from customized_grpo.studies.bench.record import BenchFolder, Job
from customized_grpo.studies.bench.suites import Suite, Task
from customized_grpo.train.rollout import sample_ode

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """The tasks of one process, and what it needs to measure them."""

    plan: Plan
    suite: Suite
    folder: BenchFolder
    progress: Progress
    part: int = 0
    parts: int = 1

    def measure(self, build: Callable[[], Policy]) -> None:
        """Generate and score the images of this process; the first process also scores the real images."""
        if torch.cuda.is_available():
            torch.cuda.set_device(default_device())  # of metrics too, which take the current one
        if self.part == 0:
            self._save_references()
            for name, metric in self.plan.metrics.items():  # first, so that a wrong path fails at the start
                if self.folder.real_scores(name) is None:
                    with loaded_reward(metric.spec, "metric") as reward:
                        self._score_real(name, metric, reward)
        jobs = self._jobs(self.suite.tasks[self.part :: self.parts])
        if missing := [job for job in jobs if not self.folder.image(job).is_file()]:
            self._generate(build(), missing, len(jobs))
        for name, metric in self.plan.metrics.items():
            known = self.folder.scores(name)
            if missing := [(task, n) for task, n in jobs if (task.id, n) not in known]:
                with loaded_reward(metric.spec, "metric") as reward:
                    self._score(name, metric, reward, missing, len(jobs))

    def is_complete(self) -> bool:
        """Whether every image of all processes has every score."""
        wanted = {(task.id, n) for task, n in self._jobs(self.suite.tasks)}
        return all(
            wanted <= self.folder.scores(name).keys() and self.folder.real_scores(name) is not None
            for name in self.plan.metrics
        )

    def _jobs(self, tasks: Iterable[Task]) -> list[Job]:
        return [(task, n) for task in tasks for n in range(self.plan.images)]

    @torch.no_grad()
    def _generate(self, policy: Policy, missing: list[Job], total: int) -> None:
        """Generate images from noise that depends on (seed, task, image) alone."""
        plan, done = self.plan, total - len(missing)
        self.progress("images", done, total)
        shown = ((job, self.suite.example(job[0], True)) for job in missing)
        for group in grouped(shown, lambda pair: policy.shape_key(pair[1]), plan.settings.batch):
            conditioning = policy.encode([example for _, example in group])
            keys = [("bench", plan.seed, task.id, n) for (task, n), _ in group]
            seed_global(*keys[0])
            noise = normal(policy.latent_shape(conditioning), keys)
            images = sample_ode(policy, conditioning, noise, plan.num_inference_steps)
            for (job, _), image in zip(group, images, strict=True):
                self.folder.save(self.folder.image(job), to_pil(image))
            done += len(group)
            self.progress("images", done, total)

    def _save_references(self) -> None:
        """The references of each subject, for the report."""
        for task in {task.subject: task for task in reversed(self.suite.tasks)}.values():
            if not self.folder.reference(task.subject, 0).is_file():
                for n, image in reversed(list(enumerate(self.suite.example(task, True).references))):
                    small = image.convert("RGB")
                    small.thumbnail((512, 512))
                    self.folder.save(self.folder.reference(task.subject, n), small)

    def _score(self, name: str, metric: Metric, reward: RewardFunction, missing: list[Job], total: int) -> None:
        """Score the PNG files."""
        done = total - len(missing)
        self.progress(name, done, total)
        examples: dict[str, Example] = {}  # images of a task share one, so that its references are embedded once

        def opened() -> Iterator[tuple[Job, Any, Example]]:
            for task, n in missing:
                if task.id not in examples:
                    examples.clear()
                    examples[task.id] = self.suite.example(task, metric.role == "copy")
                yield (task, n), read_picture(self.folder.image((task, n)))[0], examples[task.id]

        for group in grouped(opened(), lambda row: row[1].size, self.plan.settings.score_batch):
            images = torch.stack([to_tensor(image) for _, image, _ in group])
            (task, n), *_ = group[0]
            seed_global("score", task.id, n)
            values = score(images, [example for *_, example in group], {name: reward})[:, 0].tolist()
            self.folder.add_scores(name, self.part, zip([job for job, *_ in group], values, strict=True))
            done += len(group)
            self.progress(name, done, total)

    def _score_real(self, name: str, metric: Metric, reward: RewardFunction) -> None:
        """Score every real image against the others of its subject; only renderings have a prompt."""
        found: list[tuple[str, str, float]] = []
        for number, real in enumerate(self.suite.real(), start=1):
            compared = real.others[metric.role == "copy"]
            if compared is not None and (metric.role != "prompt" or compared.prompt):
                seed_global("oracle", real.name)
                value = score(to_tensor(real.image).unsqueeze(0), [compared], {name: reward})
                found.append((real.subject, real.name, float(value[0, 0])))
            self.progress(f"real images, {name}", number, 0)
        self.folder.save_real(name, found)


def grouped(rows: Iterable[T], key: Callable[[T], Any], size: int) -> Iterator[list[T]]:
    """Neighbours with equal keys, at most `size` together."""
    for _, group in itertools.groupby(rows, key):
        while some := list(itertools.islice(group, size)):
            yield some
