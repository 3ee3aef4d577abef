"""What to know before trusting the report of a run. docs/metrics.md explains the limits."""

from collections.abc import Iterable, Iterator

import numpy as np

from customized_grpo.page import Remark
from customized_grpo.page.formats import words
from customized_grpo.store.run import RunRecord
from customized_grpo.store.scores import change
from customized_grpo.studies.report.alarms import alarms
from customized_grpo.studies.report.verdict import Verdict

RATIO_TOLERANCE = 1e-4
"""A first-update ratio further from 1 than this is no longer small against the usual clip ranges."""
CLIP_LIMIT = 0.5
"""Mean clip share over the last quarter of training."""
NORM_LIMIT = 1.1
"""Mean norm of the velocity over the last quarter of training, relative to that of the base policy."""
CLAMP_LIMIT = 0.05
"""Mean share of clamped advantages."""
R_LIMIT = 0.05
"""Standard deviation of r, of nft; with less, r hardly leaves one half."""


def remarks(record: RunRecord, verdict: Verdict | None, problems: Iterable[str] = ()) -> list[Remark]:
    """Everything worth a sentence, serious or not.

    Args:
        record: the run.
        verdict: first against last evaluation; None without two.
        problems: what else could not be read.
    """
    unreadable = (Remark(problem) for problem in (*record.problems, *problems))
    return [*_status(record), *(alarms(verdict) if verdict else ()), *_rewards(record), *_scores(record, verdict),
            *_update(record), *unreadable]  # fmt: skip


def _status(record: RunRecord) -> Iterator[Remark]:
    if record.status == "failed":
        yield Remark("The run failed; this is what it had done until then.", True)
    elif record.status == "interrupted":
        yield Remark("The run was interrupted; it can be resumed from its last checkpoint.")
    elif record.status == "running":
        yield Remark("The run was still going when this report was written.")
    elif record.status == "finished" and record.rows and record.iterations[-1] < (record.planned_iterations or 0):
        yield Remark("The run stopped early: the held-out worst-reward gain no longer improved (training.early_stop).")
    elif record.status == "killed":
        yield Remark("The run was killed; it can be resumed from its last checkpoint.", True)
    if not record.rows:
        yield Remark("No iteration has been logged yet.")


def _rewards(record: RunRecord) -> Iterator[Remark]:
    samples = np.nan_to_num(record.series("samples")).max(initial=0)
    for name in record.rewards:
        if unscored := int(np.nansum(record.series(f"reward/{name}/unscored"))):
            yield Remark(f"{words(name)} could not score {unscored:,} of {samples:,.0f} training samples.", True)
        spread = record.series(f"reward/{name}/spread")
        if len(spread) and (spread == 0).all():
            yield Remark(f"{words(name)} was the same for every sample of a group, so it taught nothing.", True)


def _scores(record: RunRecord, verdict: Verdict | None) -> Iterator[Remark]:
    for metric in record.metrics:
        values = record.held_out(metric)
        if missing := int((~np.isfinite(values)).sum()):
            text = f"{words(metric)} could not score {missing:,} of {len(values):,} held-out pictures"
            paired = change(verdict.before, verdict.after, metric) if verdict and metric in verdict.metrics else None
            if paired and paired.unscored:
                text += f"; {paired.unscored} of {paired.unscored + paired.tasks} tasks are left out of its change"
            yield Remark(f"{text}.")


def _update(record: RunRecord) -> Iterator[Remark]:
    if (skipped := int(np.nan_to_num(record.series("update/skipped")).max(initial=0))) > 0:
        yield Remark(
            f"{skipped} {'update was' if skipped == 1 else 'updates were'} skipped: loss or gradient was not finite.",
            True,
        )
    error = record.series("update/first_ratio_error")
    if (error > RATIO_TOLERANCE).any():
        yield Remark(
            f"The first update's ratio was off by up to {np.nanmax(error):.1g}: "
            "the update does not recompute what the rollout sampled.",
            True,
        )
    if (norm := _mean(_end(record.series("update/velocity_norm")))) > NORM_LIMIT:
        yield Remark(
            f"The norm of the velocity is {norm:.2f} times what it was: images lose quality that the rewards do not "
            "see; set method.norm_hinge or method.beta, or lower the learning rate.",
            True,
        )
    if (share := _mean(_end(record.series("update/clip_share")))) > CLIP_LIMIT:
        yield Remark(f"The clip stopped {share:.0%} of the gradient at the end: lower the learning rate.", True)
    if (share := _mean(record.series("advantage/clamped"))) > CLAMP_LIMIT:
        yield Remark(f"{share:.0%} of the advantages were clamped.", True)


def _end(values: np.ndarray) -> np.ndarray:
    """The last quarter."""
    return values[-max(1, len(values) // 4) :]


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")
