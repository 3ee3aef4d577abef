"""What a bench says: means with intervals over subjects, the oracle line, the copy-paste alarm, paired differences."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from customized_grpo.errors import UserError
from customized_grpo.settings.identity import same_result
from customized_grpo.store.scores import Estimate, estimate
from customized_grpo.studies.bench.record import Bench

COPIED = 0.5
"""A background of which so much is the reference's, pixel for pixel, counts as copied."""


def levels(bench: Bench, chosen: Sequence[bool] | None = None) -> dict[str, Estimate]:
    """Mean of every metric over tasks (or those chosen), with the 95 % interval over subjects."""
    keep = np.ones(len(bench.tasks), bool) if chosen is None else np.asarray(chosen)
    subjects = np.array(bench.scores.subjects)[keep].tolist()
    return {name: _rounded(estimate(bench.scores.per_task(name)[keep], subjects)) for name in bench.metrics}


def oracle_levels(bench: Bench) -> dict[str, Estimate]:
    """Mean of every metric over the true pictures: first within each subject, so that subjects count alike."""
    found = {}
    for metric, scored in bench.oracle.items():
        means = _by_subject(scored)
        found[metric] = _rounded(estimate(np.array([*means.values()]), [*means]))
    return found


def above_oracle(bench: Bench, metric: str) -> tuple[Estimate, float]:
    """How far the pictures are above their own subjects' oracle line, and the share of pictures that are.

    The estimate is of the mean difference over subjects, with its 95 % interval; NaN where there is no line.
    """
    line = _by_subject(bench.oracle[metric])
    subjects = bench.scores.subjects
    beyond = bench.scores.column(metric).T - np.array([line.get(s, np.nan) for s in subjects])[:, None]
    means = _by_subject([(subject, value) for subject, row in zip(subjects, beyond, strict=True) for value in row])
    if not means:
        return Estimate(np.nan, np.nan, np.nan), float("nan")
    above = float((beyond[np.isfinite(beyond)] > 0).mean())
    return _rounded(estimate(np.array([*means.values()]), [*means])), above


@dataclass(frozen=True)
class Alarm:
    """A sign that pictures are the reference pasted, or that it cannot be told."""

    text: str
    serious: bool


def alarms(bench: Bench) -> list[Alarm]:
    """Identity above what real photos have in common; backgrounds that are the reference's."""
    found: list[Alarm] = []
    for name, metric in bench.metrics.items():
        level = levels(bench)[name]
        if metric.role == "prompt":
            continue
        if metric.role == "copy" and not np.isfinite(level.value):
            found.append(Alarm(f"{metric.title} is not measured: no reference has a mask (docs/bench.md).", False))
            continue
        difference, share = above_oracle(bench, name)
        line = oracle_levels(bench)[name].value
        if difference.low > 0:
            text = (
                f"copy-paste? {metric.title} is {level.value:.3f}, above the oracle line {line:.3f} of true pictures "
                f"(each subject against its own: {difference.value:+.3f}, 95 % {difference.low:+.3f} to "
                f"{difference.high:+.3f}); {share:.0%} of the pictures are above it."
            )
            found.append(Alarm(text, True))
        elif difference.value > 0:
            text = f"{metric.title} is {level.value:.3f}, the oracle line {line:.3f}: too close to tell."
            found.append(Alarm(text, False))
        if metric.role == "copy" and level.value > COPIED:
            found.append(
                Alarm(
                    f"copy-paste? On average {level.value:.0%} of the background is the reference's to the pixel.", True
                )
            )
    return found


@dataclass(frozen=True)
class Group:
    """Some of the tasks."""

    title: str
    tasks: int
    levels: Mapping[str, Estimate]


def breakdown(bench: Bench) -> list[Group]:
    """By kind of subject and by kind of prompt, where there is more than one."""
    groups = []
    for what in ("kind", "prompt_kind"):
        of = [getattr(task, what) for task in bench.tasks]
        kinds = list(dict.fromkeys(of))
        for kind in kinds if len(kinds) > 1 else []:
            chosen = [other == kind for other in of]
            groups.append(Group(kind, sum(chosen), levels(bench, chosen)))
    return groups


def paired(bench: Bench, other: Bench) -> dict[str, Estimate]:
    """`bench` less `other`, task by task, for the metrics that both have.

    Raises:
        UserError: if they are not of the same protocol, tasks, noise and metrics.
    """
    for what in ("protocol", "images", "seed", "num_inference_steps"):
        ours, theirs = (b.info["identity"].get(what) for b in (bench, other))
        if ours != theirs:
            raise UserError(
                f"'{other.folder.path}' does not pair with this bench: its {what} is {theirs}, this one's {ours}."
            )
    if [(t.id, t.prompt) for t in bench.tasks] != [(t.id, t.prompt) for t in other.tasks]:
        raise UserError(f"'{other.folder.path}' does not pair with this bench: it is of other tasks.")
    common = [name for name in bench.metrics if name in other.metrics]
    for name in common:
        if not same_result(other.metrics[name].spec, bench.metrics[name].spec, "metric", foreign=False):
            raise UserError(f"'{other.folder.path}' does not pair with this bench: it measures {name} otherwise.")
    differences = {name: bench.scores.per_task(name) - other.scores.per_task(name) for name in common}
    return {name: _rounded(estimate(values, bench.scores.subjects)) for name, values in differences.items()}


def _rounded(found: Estimate) -> Estimate:
    """The resamples are exact to float32."""
    return Estimate(found.value, round(found.low, 6), round(found.high, 6))


@dataclass(frozen=True)
class Published:
    """A row of a published table."""

    method: str
    protocol: str
    """The one of ours that is nearest to how it was measured."""
    by: str
    """Who measured it."""
    source: str
    about: str
    titles: Mapping[str, str]
    """Per metric of ours, what the source calls it."""
    scores: Mapping[str, float]


def published(metrics: Sequence[str]) -> list[Published]:
    """The published numbers of the field that have one of the metrics, with their sources."""
    content: Any = json.loads((files("customized_grpo.studies.bench") / "published.json").read_text(encoding="utf-8"))
    found = []
    for row in content["rows"]:
        table = content["tables"][row["table"]]
        if set(row["scores"]) & set(metrics):
            about = {key: table[key] for key in ("protocol", "by", "source", "about")}
            found.append(Published(row["method"], **about, titles=table["metrics"], scores=row["scores"]))
    return found


def published_beside(bench: Bench) -> list[Published]:
    """Published numbers to show with a bench; none for pictures of several subjects, or of other data."""
    return published(list(bench.metrics)) if bench.protocol in ("dreambooth", "uno", "customized-grpo") else []


def comparability(bench: Bench, entry: Published) -> str:
    """Whether a published number may be held against the bench's own, in a few words."""
    if entry.protocol != bench.protocol:
        return "no: other protocol"
    return "no: departures" if bench.info["departures"] else "roughly"


def _by_subject(scored: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Mean of each subject over what was scored."""
    groups: dict[str, list[float]] = {}
    for subject, value in scored:
        if np.isfinite(value):
            groups.setdefault(subject, []).append(value)
    return {subject: float(np.mean(values)) for subject, values in groups.items()}
