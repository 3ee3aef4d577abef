"""The folder of a bench, which several processes fill: a PNG for each image, and scores line by line."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from customized_grpo.data.images import png
from customized_grpo.errors import UserError
from customized_grpo.moved import current
from customized_grpo.settings import Spec
from customized_grpo.settings.identity import runtime_arguments
from customized_grpo.shell import command
from customized_grpo.store import Folder, plain, read_json, scores
from customized_grpo.store.scores import Scores, to_number
from customized_grpo.studies.bench.protocols import Metric
from customized_grpo.studies.bench.suites import Task
from customized_grpo.train.trackers import provenance

Job = tuple[Task, int]
"""One image: its task, and its number among the images of the task."""


class BenchFolder(Folder):
    """BENCH/: bench.json, images/, references/, scores/, oracle/, scores.parquet or .csv, report.html, report.md."""

    KIND, MARKER, INFO, COMMAND, FORMAT = "bench", "bench.json", "bench.json", "bench", 2

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.images, self.oracle = self.path / "images", self.path / "oracle"

    def facts(self) -> dict[str, Any]:
        """bench.json. Format 1 has the identity in a mapping of its own, and lists in two more files."""
        found = super().facts()
        if identity := found.pop("identity", {}):
            lists = {name: self.path / f"{name}.json" for name in ("tasks", "against")}
            found |= identity | {name: read_json(file) for name, file in lists.items() if file.is_file()}
            for spec in (identity["policy"], *(metric["spec"] for metric in identity["metrics"].values())):
                module, colon, name = spec["use"].partition(":")
                spec["use"] = f"{current(module) or module}{colon}{name}"
        return found

    def join(self, identity: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Claim the folder as one of several processes, and note more facts about it.

        Metrics may come, go and change until they have scored something; the policy and the settings of its images may
        change until there is an image; arguments that do not change the result may always change.

        Raises:
            UserError: if it holds another bench, or anything else.
        """

        def free(name: str) -> bool:
            part, *inner = name.split(".")
            if part == "metrics" and inner:
                metric = identity["metrics"].get(inner[0])
                if metric is None or inner[1:2] != ["spec"]:  # removed, or added, or another title
                    return True
                unused = not self.scores(inner[0]) and self.real_scores(inner[0]) is None
                return unused or inner[2] in runtime_arguments(Spec(**metric["spec"]), "metric")
            if part == "policy" and inner and inner[0] in runtime_arguments(Spec(**identity["policy"]), "policy"):
                return True
            measured = self.oracle.is_dir() and part in ("protocol", "subjects", "tasks")
            return not (self.images.is_dir() or measured)

        self.check_own()
        with self.lock(briefly=True):
            self.claim(identity, free=free)
            self.describe(**{**provenance(), **self.facts(), **about})

    def end(self, against: Iterable[Path]) -> None:
        """Note that the bench is finished, and the benches that its report compares with."""
        with self.lock(briefly=True):
            self.finish("finished", against=[path.resolve() for path in against])

    def against(self) -> list[Path]:
        """The benches that the report compares with, where they still exist."""
        return [path for name in self.facts().get("against", ()) if (path := Path(name)).is_dir()]

    # ---- images

    def image(self, job: Job) -> Path:
        task, n = job
        return self.images / task.subject / f"{task.id}-{n}.png"

    def reference(self, subject: str, n: int) -> Path:
        return self.path / "references" / f"{subject}-{n}.png"

    def save(self, path: Path, image: Image.Image) -> None:
        self.write(str(path.relative_to(self.path)), png(image))

    # ---- scores

    def scores(self, metric: str) -> dict[tuple[str, int], float]:
        """Scores by task and image, NaN where the metric could not score; damaged lines are left out."""
        rows = self.rows(f"scores/{metric}.*.jsonl", task=str, image=int)
        return {(row["task"], row["image"]): to_number(row["score"]) for row in rows if "score" in row}

    def add_scores(self, metric: str, part: int, scored: Iterable[tuple[Job, float]]) -> None:
        """Append to the file of this process."""
        rows = [{"task": task.id, "image": n, "score": score} for (task, n), score in scored]
        self.append(f"scores/{metric}.{part}.jsonl", *rows)

    def real_scores(self, metric: str) -> tuple[tuple[str, float], ...] | None:
        """(subject, score) of every real image, or None if they are not measured yet."""
        path = self.oracle / f"{metric}.json"
        if not path.is_file():
            return None
        return tuple((entry["subject"], to_number(entry["score"])) for entry in read_json(path))

    def save_real(self, metric: str, scored: Iterable[tuple[str, str, float]]) -> None:
        """Write (subject, name, score) of every real image."""
        entries = [dict(zip(("subject", "picture", "score"), row, strict=True)) for row in scored]
        self.write(f"oracle/{metric}.json", json.dumps(plain(entries), indent=1))


@dataclass(frozen=True)
class Bench:
    """A finished bench, read from its folder."""

    folder: BenchFolder
    info: Mapping[str, Any]
    tasks: tuple[Task, ...]
    metrics: Mapping[str, Metric]
    scores: Scores
    """A replicate is an image; the kinds are those of the prompts."""
    real: Mapping[str, tuple[tuple[str, float], ...]]
    """(subject, score) of the real images for each metric; empty where there are none."""

    @property
    def label(self) -> str:
        return str(self.info["label"])

    @property
    def images(self) -> int:
        """Of each task."""
        return len(self.scores.values)


def read_bench(path: Path) -> Bench:
    """Read the folder of a finished bench.

    Raises:
        UserError: if it holds no bench, or there are images without a score.
    """
    folder = BenchFolder.existing(path)
    try:
        info = folder.read_facts()
        tasks, images = tuple(Task(**entry) for entry in info["tasks"]), int(info["images"])
        metrics = {name: Metric(**entry) for name, entry in info["metrics"].items()}
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"'{path}' holds no bench that can be read ({type(error).__name__}); run it anew.") from error
    values = np.full((images, len(tasks), len(metrics)), np.nan)
    for k, metric in enumerate(metrics):
        found = folder.scores(metric)
        if missing := sum((task.id, n) not in found for task in tasks for n in range(images)):
            raise UserError(
                f"The bench in '{path}' is not finished: {missing} of {len(tasks) * images} images lack {metric}; "
                f"run the same `{command('bench')}` again to resume it."
            )
        values[:, :, k] = [[found[task.id, n] for task in tasks] for n in range(images)]
    columns = (tuple(getattr(task, name) for task in tasks) for name in ("id", "subject", "prompt_kind", "prompt"))
    table = Scores(values, tuple(metrics), (), *columns, iteration=info.get("iteration") or 0)
    return Bench(folder, info, tasks, metrics, table, {name: folder.real_scores(name) or () for name in metrics})


def write_table(bench: Bench) -> Path:
    """Write scores.parquet, or scores.csv where pyarrow is not installed: a row for each image."""
    root, jobs = bench.folder.path, [(task, n) for task in bench.tasks for n in range(bench.images)]
    more = [{"kind": job[0].kind, "image": bench.folder.image(job).relative_to(root).as_posix()} for job in jobs]
    return scores.write_table(root / "scores", bench.scores, more)
