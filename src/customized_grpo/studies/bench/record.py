"""The folder of a bench: what it is, a PNG for each picture, scores line by line. Complete or absent, never half."""

import csv
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from customized_grpo.data.images import png
from customized_grpo.errors import UserError
from customized_grpo.settings import Spec
from customized_grpo.settings.identity import same_result
from customized_grpo.store import append, read_lines, replacing, write
from customized_grpo.store.scores import Scores
from customized_grpo.studies.bench.protocols import Metric, Role
from customized_grpo.studies.bench.suites import Task

Job = tuple[Task, int]
"""A picture to be: its task, and which of the task's images."""


class BenchFolder:
    """BENCH/: bench.json, tasks.json, images/, references/, scores/, oracle/, scores.parquet or .csv, report.html."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info, self.tasks = path / "bench.json", path / "tasks.json"
        self.images, self.references = path / "images", path / "references"
        self.scores, self.oracle = path / "scores", path / "oracle"

    def claim(self, identity: Mapping[str, Any], about: Mapping[str, Any], tasks: Sequence[Task]) -> None:
        """Make the folder, or go on with the bench in it.

        Args:
            identity: what two processes of one bench have in common.
            about: the rest of bench.json.
            tasks: of the bench.

        Metrics may come, go and change as long as they have not scored anything; the rest as long as nothing is drawn.

        Raises:
            UserError: if it holds another bench, or anything else.
        """
        listed, wanted = [asdict(task) for task in tasks], json.loads(json.dumps(identity, default=str))
        if self.path.exists() and not self.info.exists() and self._foreign():
            raise UserError(f"'{self.path}' holds something that is no bench; name another --output.")
        if not self.info.exists():
            for file, content in ((self.tasks, listed), (self.info, {"identity": identity, **about})):
                with suppress(FileExistsError):  # the first of several processes wins
                    write(file, json.dumps(content, indent=1, default=str), new=True)
        info = read_json(self.info)
        known = info["identity"]
        if known == wanted and read_json(self.tasks) == listed:
            return
        drawn = self.images.is_dir()
        for name in wanted if drawn else ():
            before, now = known.get(name, wanted[name]), wanted[name]
            same = same_result(Spec(**before), Spec(**now), "policy") if name == "policy" else before == now
            if name != "metrics" and not same:
                raise self._another(name, before, now)
        if read_json(self.tasks) != listed:
            if drawn:
                raise UserError(f"'{self.path}' holds a bench of other tasks; name another --output.")
            shutil.rmtree(self.oracle, ignore_errors=True)
            write(self.tasks, json.dumps(listed, indent=1))
        for name, metric in wanted["metrics"].items():
            before = known["metrics"].get(name, metric)
            if not same_result(Spec(**before["spec"]), Spec(**metric["spec"]), "metric"):
                if self.score_lines(name):
                    raise self._another(f"metric {name}", before["spec"], metric["spec"])
                (self.oracle / f"{name}.json").unlink(missing_ok=True)
        write(self.info, json.dumps({**info, "identity": wanted, **about}, indent=1, default=str))

    def _another(self, name: str, seen: Any, now: Any) -> UserError:
        return UserError(
            f"'{self.path}' holds another bench: its {name} is {_brief(seen)}, and this one's {_brief(now)}; "
            f"name another --output."
        )

    def _foreign(self) -> bool:
        """Whether there is anything but what a kill in the first moment leaves."""
        ours = ("tasks.json", "bench.json")
        return not self.path.is_dir() or any(not p.name.lstrip(".").startswith(ours) for p in self.path.iterdir())

    def remember(self, against: Iterable[Path]) -> None:
        """Which benches the report compares with."""
        write(self.path / "against.json", json.dumps([str(path.resolve()) for path in against]))

    def against(self) -> list[Path]:
        """What was remembered, where it is still there."""
        file = self.path / "against.json"
        return [path for name in read_json(file) if (path := Path(name)).is_dir()] if file.is_file() else []

    # ---- pictures

    def image(self, job: Job) -> Path:
        task, n = job
        return self.images / task.subject / f"{task.id}-{n}.png"

    def save_image(self, job: Job, image: Image.Image) -> None:
        write(self.image(job), png(image))

    def reference(self, subject: str, n: int) -> Path:
        return self.references / f"{subject}-{n}.png"

    def save_reference(self, subject: str, n: int, image: Image.Image) -> None:
        write(self.reference(subject, n), png(image))

    # ---- scores

    def score_lines(self, metric: str) -> dict[tuple[str, int], float]:
        """(task, image) to score, NaN where it could not be measured; a line that a kill has cut is left out."""
        found: dict[tuple[str, int], float] = {}
        for file in sorted(self.scores.glob(f"{metric}.*.jsonl")) if self.scores.is_dir() else []:
            for row in read_lines(file, task=str, image=int).rows:
                if isinstance(value := row.get("score", ""), int | float | None):
                    found[row["task"], row["image"]] = float("nan") if value is None else float(value)
        return found

    def add_scores(self, metric: str, part: int, scored: Iterable[tuple[Job, float]]) -> None:
        """Append to this process's own file."""
        append(
            self.scores / f"{metric}.{part}.jsonl",
            *({"task": task.id, "image": n, "score": float(value)} for (task, n), value in scored),
        )

    def oracle_scores(self, metric: str) -> list[tuple[str, float]] | None:
        """(subject, score) of every true picture, or None if they are not measured yet."""
        path = self.oracle / f"{metric}.json"
        if not path.is_file():
            return None
        return [(e["subject"], float("nan") if e["score"] is None else e["score"]) for e in read_json(path)]

    def save_oracle(self, metric: str, scored: Iterable[tuple[str, str, float]]) -> None:
        """(subject, picture, score) of every true picture."""
        entries = [
            {"subject": subject, "picture": name, "score": value if np.isfinite(value) else None}
            for subject, name, value in scored
        ]
        write(self.oracle / f"{metric}.json", json.dumps(entries, indent=1))


@dataclass(frozen=True)
class Bench:
    """A finished bench, read from its folder."""

    folder: BenchFolder
    info: Mapping[str, Any]
    tasks: tuple[Task, ...]
    metrics: Mapping[str, Metric]
    scores: Scores
    """A replicate is an image; the kinds are those of the prompts."""
    oracle: Mapping[str, tuple[tuple[str, float], ...]]
    """Per metric (subject, score) of the true pictures; empty where there are none."""

    @property
    def label(self) -> str:
        return str(self.info["label"])

    @property
    def protocol(self) -> str:
        return str(self.info["identity"]["protocol"])

    @property
    def images(self) -> int:
        """Of each task."""
        return len(self.scores.values)


def read_bench(path: Path) -> Bench:
    """Read the folder of a finished bench.

    Raises:
        UserError: if it is none, or pictures are not scored yet.
    """
    folder = BenchFolder(Path(path))
    if not folder.info.is_file():
        raise UserError(f"'{path}' is not a bench: it has no bench.json; `cgrpo bench` makes one.")
    info, tasks = read_json(folder.info), tuple(Task(**entry) for entry in read_json(folder.tasks))
    metrics = {
        name: Metric(_role(entry["role"]), Spec(**entry["spec"]), entry["title"])
        for name, entry in info["identity"]["metrics"].items()
    }
    images = int(info["identity"]["images"])
    values = np.full((images, len(tasks), len(metrics)), np.nan)
    for k, metric in enumerate(metrics):
        lines = folder.score_lines(metric)
        missing = [key for task in tasks for n in range(images) if (key := (task.id, n)) not in lines]
        if missing:
            raise UserError(
                f"The bench in '{path}' is not finished: {len(missing)} of {len(tasks) * images} images lack {metric}; "
                f"run the same `cgrpo bench` again to go on."
            )
        values[:, :, k] = [[lines[task.id, n] for task in tasks] for n in range(images)]
    oracle = {metric: tuple(folder.oracle_scores(metric) or ()) for metric in metrics}
    names = ("id", "subject", "prompt_kind", "prompt")
    columns = (tuple(getattr(task, name) for task in tasks) for name in names)
    scores = Scores(values, tuple(metrics), (), *columns, iteration=info["identity"].get("iteration") or 0)
    return Bench(folder, info, tasks, metrics, scores, oracle)


def rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """One for each picture, as `scores.parquet` has them."""
    for t, task in enumerate(bench.tasks):
        for n in range(bench.images):
            image = bench.folder.image((task, n)).relative_to(bench.folder.path).as_posix()
            scores = {name: float(bench.scores.column(name)[n, t]) for name in bench.metrics}
            yield {
                "task": task.id, "subject": task.subject, "kind": task.kind, "prompt_kind": task.prompt_kind,
                "prompt": task.prompt, "n": n, "image": image, **scores,
            }  # fmt: skip


def write_table(bench: Bench) -> Path:
    """Write scores.parquet, or scores.csv where pyarrow is not installed."""
    found = list(rows(bench))
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        target = bench.folder.path / "scores.csv"
        with replacing(target) as draft, draft.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]))
            writer.writeheader()
            writer.writerows({k: "" if v != v else v for k, v in row.items()} for row in found)
        return target
    target = bench.folder.path / "scores.parquet"
    with replacing(target) as draft:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), draft)
    return target


def read_json(path: Path) -> Any:
    """What a file of a bench holds.

    Raises:
        UserError: if it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' is missing or damaged ({type(error).__name__}); name another --output.") from error


def _role(name: str) -> Role:
    roles: dict[str, Role] = {"identity": "identity", "prompt": "prompt", "copy": "copy"}
    return roles[name]


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."
