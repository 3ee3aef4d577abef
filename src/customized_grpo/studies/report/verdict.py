"""What changed between an evaluation before training and one after it: in all, by kind, and in the worst kind."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from customized_grpo import page
from customized_grpo.page.formats import listed, number, with_interval, words
from customized_grpo.page.parts import FEW_SUBJECTS
from customized_grpo.store.scores import Change, Estimate, Scores, change, estimate, finite_mean, is_share, is_yes_or_no


class Moved(NamedTuple):
    """A change of one metric on the tasks of one kind."""

    kind: str
    change: Change
    gain: float
    """The change in standard deviations over the tasks of the first evaluation; NaN where these do not differ."""

    @property
    def counts(self) -> bool:
        """Whether at least 10 different subjects were scored both times."""
        return self.change.subjects >= FEW_SUBJECTS


@dataclass(frozen=True)
class Verdict:
    """Two evaluations of the same tasks with the same noise."""

    before: Scores
    after: Scores

    @cached_property
    def metrics(self) -> list[str]:
        """Those measured both times, rewards first."""
        shared = [metric for metric in self.before.metrics if metric in self.after.metrics]
        return sorted(shared, key=lambda metric: metric not in self.before.rewards)

    @cached_property
    def changes(self) -> list[Change]:
        """Of every metric over all tasks."""
        found = (change(self.before, self.after, metric) for metric in self.metrics)
        return [some for some in found if some.tasks]

    @cached_property
    def by_kind(self) -> dict[str, list[Change]]:
        """The same for the tasks of each kind; empty where all tasks are of one kind."""
        parts = {kind: self.before.of_kind(kind) for kind in self.before.distinct_kinds()}
        return {kind: [change(part, self.after, c.metric) for c in self.changes] for kind, part in parts.items()}

    @property
    def trained(self) -> list[Change]:
        return [c for c in self.changes if c.metric in self.before.rewards]

    @property
    def untrained(self) -> list[Change]:
        return [c for c in self.changes if c.metric not in self.before.rewards]

    @cached_property
    def subjects(self) -> int:
        """How many subjects some metric scored both times."""
        return max((c.subjects for c in self.changes), default=0)

    @cached_property
    def deciding(self) -> list[str]:
        """The metrics that decide: those that were not trained on, because these are not hacked; else the rewards."""
        return [c.metric for c in self.untrained or self.trained]

    def moved(self) -> Iterator[Moved]:
        """Every deciding metric of every kind."""
        for kind, changes in self.by_kind.items():
            for some in changes:
                if some.metric in self.deciding and some.tasks:
                    spread = float(np.nanstd(self.before.per_task(some.metric)))
                    yield Moved(kind, some, some.difference.value / spread if spread > 0 else np.nan)

    @cached_property
    def worst(self) -> Moved | None:
        """Of the kinds and deciding metrics that count, the one that gained least in standard deviations."""
        counted = [moved for moved in self.moved() if moved.counts and np.isfinite(moved.gain)]
        return min(counted, key=lambda moved: moved.gain, default=None)

    def gains(self) -> dict[int, tuple[float, str]]:
        """By the place of a task: the worst change of a deciding metric in its first image, and its levels.

        The change is in standard deviations over the tasks of the first evaluation.
        """
        places = {task: n for n, task in enumerate(self.after.tasks)}
        shared = [(n, places[task]) for n, task in enumerate(self.before.tasks) if task in places]
        found: dict[int, tuple[float, str]] = {}
        for metric in self.deciding:
            first, last = self.before.column(metric)[0], self.after.column(metric)[0]
            spread = float(np.nanstd(self.before.per_task(metric)))
            for n, place in shared:
                gain = float((last[place] - first[n]) / spread) if spread > 0 else np.nan
                if gain < found.get(place, (np.inf, ""))[0]:
                    found[place] = gain, f"{words(metric)} {number(first[n])} → {number(last[place])}"
        return found

    def above_permitted(self, metric: str, kind: str) -> tuple[float, Estimate]:
        """What the targets of a kind of prompt score, and by how much images score more; NaN without targets."""
        before = self.before.of_kind(kind) if self.by_kind else self.before
        if before.permitted is None:
            return np.nan, Estimate(np.nan, np.nan, np.nan)
        later = dict(zip(self.after.tasks, self.after.per_task(metric), strict=True))
        allowed = before.permitted[:, before.metrics.index(metric)]
        excess = np.array([later.get(task, np.nan) for task in before.tasks]) - allowed
        return float(finite_mean(allowed)), estimate(excess, before.subjects)

    # ---- in words

    def is_yes_or_no(self, metric: str) -> bool:
        """Whether every image scores 0 or 1, so that images can be counted."""
        return is_yes_or_no((self.before, self.after), metric)

    def levels(self, some: Change) -> str:
        """Such as "0.578 → 0.654", or "10 of 26 → 1 of 26" images."""
        if self.is_yes_or_no(some.metric):
            (a, b), (m, n) = some.complete, some.images
            return f"{a} of {m} → {b} of {n}"
        return f"{number(some.before.value)} → {number(some.after.value)}"

    def told(self, some: Change, *, interval: bool = True) -> str:
        """The metric with its levels, and the interval of the change."""
        images = " images" if self.is_yes_or_no(some.metric) else ""
        text = f"{words(some.metric)} {self.levels(some)}{images}"
        return f"{text} ({with_interval(some.difference)})" if interval else text

    def counts_complete(self, some: Change) -> bool:
        """Whether a metric is a share, beyond yes and no, that is complete in some images."""
        evaluations = (self.before, self.after)
        ever = any((scores.column(some.metric) == 1).any() for scores in evaluations)
        return ever and not self.is_yes_or_no(some.metric) and is_share(evaluations, some.metric)

    def fell(self, some: Change) -> bool:
        """Whether its mean or, of a share, its number of complete images fell clearly."""
        fewer = self.counts_complete(some) and some.completed.verdict == "fell"
        return fewer or some.difference.verdict == "fell"

    def evidence(self, some: Change) -> str:
        """What fell: the levels, complete images, and the one interval that shows it."""
        mean = some.difference.verdict == "fell"
        return self.told(some, interval=mean) + self.complete(some, interval=not mean)

    def complete(self, some: Change, *, interval: bool = False) -> str:
        """In how many images a share is complete, if it is one and ever is."""
        if not self.counts_complete(some):
            return ""
        (a, b), (m, n) = some.complete, some.images
        text = f", complete in {a} of {m} → {b} of {n} images"
        return f"{text} ({with_interval(some.completed)})" if interval else text

    def headline(self) -> tuple[str, str]:
        """The answer in numbers, and what qualifies it. It is the worst kind's, or without one that of all tasks."""
        if self.worst is None:
            shown, rest = (self.trained, self.untrained) if self.trained else (self.changes, [])
            answer = listed([self.told(c, interval=False) for c in shown])
            lead = [
                f"The changes are {listed([f'{with_interval(c.difference)} in {words(c.metric)}' for c in shown])}."
            ]
            lead += [f"Not trained on: {listed([self.told(c, interval=False) for c in rest])}."] if rest else []
            return f"{_upper(answer)} on held-out subjects.", " ".join([*lead, self._no_kind()])
        kind, worst, _ = self.worst
        answer = f"Worst kind, {kind_name(kind)}: {self.told(worst, interval=False)}{self.complete(worst)}."
        said = {"fell": "This is a clear fall", "rose": "Even this is a clear rise", "unclear": "This is not clear"}
        (whole,) = (c for c in self.changes if c.metric == worst.metric)
        lead = f"{said[worst.difference.verdict]}: {with_interval(worst.difference)}."
        if self.fell(worst) and worst.difference.verdict != "fell":
            lead = f"Complete images clearly fell: {with_interval(worst.completed)}."
        return answer, f"{lead} All kinds together: {self.told(whole, interval=False)}."

    def _no_kind(self) -> str:
        if not self.by_kind:
            return "All tasks are of one kind, so there is no verdict by kind."
        return f"No kind of prompt has {FEW_SUBJECTS} subjects, so all tasks are taken together."

    # ---- as a table

    def table(self) -> page.Table:
        """Kinds and metrics, the levels and the paired change in each cell. A star: not trained on."""
        parts = [("all", self.changes), *self.by_kind.items()]
        rows = []
        for kind, changes in parts:
            found = max((c.subjects for c in changes), default=0)
            cells = [page.Shift(self.levels(c), c.difference) if c.tasks else "–" for c in changes]
            rows.append(page.Row(f"{kind_name(kind)} ({found} subject{'s' * (found != 1)})", cells, kind == "all"))
        columns = [words(c.metric) + ("" if c.metric in self.before.rewards else "*")
                   for c in self.changes]  # fmt: skip
        return page.Table(columns, rows, first="kind of prompt")


def kind_name(kind: str) -> str:
    """The name of a kind, or the name for tasks without one."""
    return kind or "no kind"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
