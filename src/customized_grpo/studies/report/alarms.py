"""Alarms about two evaluations, one function for each rule, for the terminal and the report.

A change is clear if its paired 95 % interval, clustered by subject, excludes 0. An alarm on fewer than 10 subjects is
shown, but not as serious. docs/metrics.md lists the rules too.
"""

import re
from collections.abc import Iterator

import numpy as np

from customized_grpo.page import Remark, parts
from customized_grpo.page.formats import listed, number, words
from customized_grpo.page.parts import FEW_SUBJECTS
from customized_grpo.store.scores import IDENTITY, PROMPT, Change
from customized_grpo.studies.report.verdict import Verdict, kind_name

ALTERING = re.compile(r"property|accessory|colou?r|outfit|style|material")
"""What the name of a kind of prompt says if its prompts change the subject."""


def alarms(verdict: Verdict) -> list[Remark]:
    """All of them, in the order of their weight."""
    rules = (kinds_that_got_worse, copying, refusing, untrained_that_fell, diversity_that_halved, few_subjects)
    return [remark for rule in rules for remark in rule(verdict)]


def kinds_that_got_worse(verdict: Verdict) -> Iterator[Remark]:
    """A kind got worse if the upper bound of the interval of a deciding metric's change is below 0.

    Of a share, such as prompt shown, the change of the number of complete images counts as well: a mean may hold where
    these are lost. Deciding are the metrics that were not trained on; if there are none, the rewards.
    """
    for kind, changes in verdict.by_kind.items():
        fell = [c for c in changes if c.metric in verdict.deciding and verdict.fell(c)]
        if fell:
            told = listed([verdict.evidence(c) for c in fell])
            yield _remark(f"{kind_name(kind)} got worse: {told}", min(c.subjects for c in fell))


def copying(verdict: Verdict) -> Iterator[Remark]:
    """A metric of identity rose clearly where one of the prompt fell clearly: the policy copies, or refuses.

    A share of the prompt also fell if its number of complete images did.

    Looked for in each kind; without kinds, in all tasks. A metric is of the prompt if its name has "prompt", "clip_t"
    or "right" in it, and of identity if it has "identity", "subject", "clip_i" or "dino".
    """
    for kind, changes in (verdict.by_kind or {"": verdict.changes}).items():
        rose = [c for c in changes if IDENTITY.search(c.metric) and c.difference.verdict == "rose"]
        fell = [c for c in changes if PROMPT.search(c.metric) and verdict.fell(c)]
        if rose and fell:
            where = f"{kind_name(kind)}: " if verdict.by_kind else ""
            up = listed([verdict.told(c) for c in rose])
            down = listed([verdict.evidence(c) for c in fell])
            text = f"{where}{up} rose while {down} fell: the reference is copied, or what the prompt asks is refused"
            yield _remark(text + _part_of_gain(verdict, rose[0]), min(c.subjects for c in (*rose, *fell)))


def refusing(verdict: Verdict) -> Iterator[Remark]:
    """Images came nearer to the reference than the prompt permits: what it asks of the subject is refused.

    A metric of identity rose clearly, and is clearly above what the targets of the same examples score. Where these
    have no targets, of kinds whose prompts change the subject: it rose clearly, and no metric of the prompt did.
    """
    for kind, changes in (verdict.by_kind or {"": verdict.changes}).items():
        shown = any(PROMPT.search(c.metric) and c.difference.verdict == "rose" for c in changes)
        where = f"{kind_name(kind)}: " if verdict.by_kind else ""
        for c in (c for c in changes if IDENTITY.search(c.metric) and c.difference.verdict == "rose"):
            level, excess = verdict.above_permitted(c.metric, kind)
            if excess.verdict == "rose":
                reason = f"to {number(excess.value)} above what true images score ({number(level)})"
            elif np.isfinite(level) or shown or not ALTERING.search(kind):
                continue
            else:
                reason = "where prompts change the subject, and nothing of the prompt rose"
            text = f"{where}{verdict.told(c)} rose {reason}: what the prompt asks of the subject is refused"
            yield _remark(text, c.subjects)


def _part_of_gain(verdict: Verdict, rose: Change) -> str:
    """How much of a metric's gain over all tasks comes from the tasks of one kind."""
    (whole,) = (c for c in verdict.changes if c.metric == rose.metric)
    total = whole.difference.value * whole.tasks
    if not verdict.by_kind or total <= 0:
        return ""
    part = rose.difference.value * rose.tasks / total
    return f"; {f'{part:.0%}' if part < 1 else 'all'} of the gain in {words(rose.metric)} over all tasks is from here"


def untrained_that_fell(verdict: Verdict) -> Iterator[Remark]:
    """A metric that was not trained on fell clearly over all tasks. Where a reward rose, it may be hacked."""
    fell = [c for c in verdict.untrained if c.difference.verdict == "fell"]
    rose = [c for c in verdict.trained if c.difference.verdict == "rose"]
    if fell:
        was = "was" if len(fell) == 1 else "were"
        text = f"{listed([verdict.told(c) for c in fell])}, which {was} not trained on, fell"
        text += f" while {listed([words(c.metric) for c in rose])} rose: reward hacking?" if rose else ""
        yield _remark(text, min(c.subjects for c in fell))


def diversity_that_halved(verdict: Verdict) -> Iterator[Remark]:
    """A metric with "diversity" in its name fell clearly, over all tasks, to half or less."""
    for c in verdict.changes:
        if "diversity" in c.metric and c.difference.verdict == "fell" and c.after.value <= c.before.value / 2:
            yield _remark(f"{verdict.told(c)} is half or less: the images of a task become one", c.subjects)


def few_subjects(verdict: Verdict) -> Iterator[Remark]:
    """Fewer than 10 subjects, in all or of a kind: a bootstrap of so few makes intervals that are too narrow."""
    if verdict.subjects == 1:
        yield Remark("There is one held-out subject, so there are no intervals.", True)
    if verdict.subjects < FEW_SUBJECTS:
        yield from parts.few_subjects(verdict.subjects)
        return
    few = [(kind_name(kind), max(c.subjects for c in changes)) for kind, changes in verdict.by_kind.items()]
    few = [f"{kind} ({count})" for kind, count in few if count < FEW_SUBJECTS]
    if few:
        yield Remark(f"Fewer than {FEW_SUBJECTS} subjects, so shown but not deciding the headline: {listed(few)}.")


def _remark(text: str, subjects: int) -> Remark:
    few = f" ({subjects} subject{'s' * (subjects != 1)}: too few to be sure)" if subjects < FEW_SUBJECTS else ""
    return Remark(f"{text}{few}{'' if text.endswith('?') and not few else '.'}", not few)
