"""From scores to means with intervals over subjects, copy-paste warnings, paired differences, and published numbers."""

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

import numpy as np

from customized_grpo.errors import UserError
from customized_grpo.page import Flipped, Plain, Remark, few_subjects
from customized_grpo.settings.identity import same_result
from customized_grpo.store.scores import Estimate, change, estimate, level
from customized_grpo.studies.bench.protocols import PROTOCOLS
from customized_grpo.studies.bench.record import Bench

COPIED = 0.5
"""A background with a larger share of pixels from the reference counts as copied."""


def levels(bench: Bench, chosen: Sequence[bool] | None = None) -> dict[str, Plain]:
    """Mean of every metric over tasks (or those chosen), with the 95 % interval over subjects."""
    scores = bench.scores if chosen is None else bench.scores.select(chosen)
    return {name: Plain(*level(scores, name)) for name in bench.metrics}


def real_levels(bench: Bench) -> dict[str, Plain]:
    """Mean of every metric over the real images: first within each subject, so that subjects have equal weight."""
    return {metric: Plain(*_over_subjects(scored)) for metric, scored in bench.real.items()}


def above_real(bench: Bench, metric: str) -> tuple[Estimate, float]:
    """How far the images are above the real images of their own subjects, and the share of images that are.

    The estimate is of the mean difference over subjects, with its 95 % interval; NaN where real images have no score.
    """
    real, subjects = _by_subject(bench.real[metric]), bench.scores.subjects
    beyond = bench.scores.column(metric).T - np.array([real.get(s, np.nan) for s in subjects])[:, None]
    scored = beyond[np.isfinite(beyond)]
    each = [(subject, value) for subject, row in zip(subjects, beyond, strict=True) for value in row]
    return _over_subjects(each), float((scored > 0).mean()) if len(scored) else float("nan")


def remarks(bench: Bench) -> list[Remark]:
    """What to know before trusting the numbers: copies, departures, images without a score, few subjects."""
    found = copying(bench)
    found += [Remark(f"departs from the protocol: {text}", True) for text in bench.info["departures"]]
    total = len(bench.tasks) * bench.images
    for name, metric in bench.metrics.items():
        count, serious = bench.scores.unscored(name), metric.role != "copy"  # no score where no mask is
        if count and (count < total or serious):
            found.append(Remark(f"{metric.title} could score {total - count:,} of {total:,} images.", serious))
    return found + few_subjects(len(set(bench.scores.subjects)))


def copying(bench: Bench) -> list[Remark]:
    """Warnings: identity above that of real images, or backgrounds copied from the reference."""
    found, means, real = [], levels(bench), real_levels(bench)
    for name, metric in bench.metrics.items():
        value, title = means[name].value, metric.title
        if metric.role == "copy" and not np.isfinite(value):
            found.append(Remark(f"{title} is not measured: no reference has a mask (docs/bench.md)."))
        elif metric.role != "prompt":
            above, share = above_real(bench, name)
            both = f"{title} is {value:.3f}, and {real[name].value:.3f} for real images"
            if above.verdict == "rose":
                own = f"{above.value:+.3f}, 95 % {above.low:+.3f} to {above.high:+.3f}"
                share = f"{share:.0%} of the images are above their real images"
                found.append(Remark(f"copy-paste? {both} (each subject compared to its own: {own}); {share}.", True))
            elif above.value > 0:
                found.append(Remark(f"{both}: no clear difference."))
            if metric.role == "copy" and value > COPIED:
                text = f"copy-paste? On average {value:.0%} of the background pixels are copied from the reference."
                found.append(Remark(text, True))
    return found


def kinds(bench: Bench) -> list[tuple[str, list[bool]]]:
    """Kinds of subject and of prompt, where there is more than one, and which tasks are of them."""
    found = []
    for what in ("kind", "prompt_kind"):
        of = [getattr(task, what) for task in bench.tasks]
        named = list(dict.fromkeys(of))
        found += [(kind, [other == kind for other in of]) for kind in named if len(named) > 1]
    return found


def paired(bench: Bench, other: Bench, chosen: Sequence[bool] | None = None) -> dict[str, Estimate]:
    """`bench` less `other`, task by task (or those chosen), for the metrics that both have.

    Raises:
        UserError: if they are not of the same protocol, tasks, noise and metrics.
    """
    why = ""
    for what in ("protocol", "images", "seed", "num_inference_steps"):
        ours, theirs = (b.info.get(what) for b in (bench, other))
        why = why or (f"its {what} is {theirs}, this one's {ours}" if ours != theirs else "")
    if [(t.id, t.prompt) for t in bench.tasks] != [(t.id, t.prompt) for t in other.tasks]:
        why = why or "it has other tasks"
    common = [name for name in bench.metrics if name in other.metrics]
    for name in common:
        if not same_result(other.metrics[name].spec, bench.metrics[name].spec, "metric", foreign=False):
            why = why or f"it measures {name} with another metric"
    if why:
        raise UserError(f"'{other.folder.path}' does not pair with this bench: {why}.")
    before = other.scores if chosen is None else other.scores.select(chosen)
    return _toned(bench, {name: change(before, bench.scores, name).difference for name in common})


def _toned(bench: Bench, changes: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """The changes, with those of which less is better as such."""
    return {name: Flipped(*some) if bench.metrics[name].role == "copy" else some for name, some in changes.items()}


@dataclass(frozen=True)
class Verdict:
    """The differences of a bench to its baseline, or to the real images, and what they say together."""

    changes: Mapping[str, Estimate]
    """By metric; of real images, only of those that they were scored by."""
    answer: Literal["better", "worse", "undecided"]
    """Better or worse if every clear difference says so, and undecided if there is none or they disagree."""


def compared(bench: Bench, baseline: Bench | None = None) -> Verdict:
    """A bench against another, or without one against the real images, of which identity above is no gain; not where
    the images are of several subjects, and the real ones of one."""
    if baseline is not None:
        changes = paired(bench, baseline)
    else:
        alone = PROTOCOLS[bench.info["protocol"]].references == 1
        found = {name: above_real(bench, name)[0] for name in bench.metrics if alone}
        changes = _toned(bench, {name: some for name, some in found.items() if np.isfinite(some.value)})
    gains = [name for name in changes if baseline is not None or bench.metrics[name].role == "prompt"]
    rose = any(changes[name].tone == "rose" for name in gains)
    fell = any(some.tone == "fell" for some in changes.values())
    return Verdict(changes, "undecided" if rose == fell else "better" if rose else "worse")


@dataclass(frozen=True)
class Published:
    """A row of a published table."""

    method: str
    scores: Mapping[str, float]
    protocol: str
    """The closest one of ours."""
    by: str
    """Who measured it."""
    source: str
    about: str
    metrics: Mapping[str, str]
    """The names of our metrics in the source."""

    def comparability(self, bench: Bench) -> str:
        """Whether the number may be compared with the bench's own, in a few words."""
        if self.protocol != bench.info["protocol"]:
            return "no: other protocol"
        return "no: departures" if set(bench.info["departures"]).difference(self.always) else "roughly"

    @property
    def always(self) -> tuple[str, ...]:
        """The departures that every bench of the protocol has."""
        return PROTOCOLS[self.protocol].departures


def published(metrics: Iterable[str], protocols: Container[str] = PROTOCOLS) -> list[Published]:
    """The published numbers of these protocols that have one of the metrics."""
    content: Any = json.loads((files("customized_grpo.studies.bench") / "published.json").read_text(encoding="utf-8"))
    rows = [row for row in content["rows"] if not set(metrics).isdisjoint(row["scores"])]
    found = [Published(row["method"], row["scores"], **content["tables"][row["table"]]) for row in rows]
    return [row for row in found if row.protocol in protocols]


def _over_subjects(scored: Iterable[tuple[str, float]]) -> Estimate:
    """Mean over subjects of their means."""
    means = _by_subject(scored)
    return estimate(np.array([*means.values()]), [*means])


def _by_subject(scored: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Mean over the finite scores of each subject."""
    groups: dict[str, list[float]] = {}
    for subject, value in scored:
        if np.isfinite(value):
            groups.setdefault(subject, []).append(value)
    return {subject: float(np.mean(values)) for subject, values in groups.items()}
