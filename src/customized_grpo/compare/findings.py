"""What the numbers force, in words. A sentence claims a difference only where the interval is clear of zero."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from customized_grpo.compare.analysis import Analysis, Balance
from customized_grpo.report.intervals import Estimate
from customized_grpo.report.page import listed, number, signed, words

VERDICT = {"rose": "Yes", "fell": "No", "unclear": "Undecided"}


@dataclass(frozen=True)
class Finding:
    """A question that the grid can answer, and the answer."""

    question: str
    verdict: str
    """Yes, No or Undecided, or what stands in their place."""
    text: str


def headline(analysis: Analysis) -> Finding:
    """Does the candidate beat the baseline? On the lesser of the two gains, and on that of the untrained twins."""
    grid, title = analysis.grid, analysis.comparison.title
    question = f"Does {title(grid.candidate)} beat {title(grid.baseline)} on held-out subjects?"
    missing = [title(m) for m in (grid.candidate, grid.baseline) if m not in analysis.methods]
    if missing:
        return Finding(question, "Not yet known", f"No finished run of {listed(missing)}.")
    if not analysis.balances:
        return Finding(question, "Not defined", "The lesser gain needs two rewards; see the differences below.")
    found = [analysis.lesser_gain_difference(grid.candidate, grid.baseline, balance) for balance in analysis.balances]
    verdicts = [VERDICT[estimate.verdict] for estimate in found]
    texts = [_against(estimate, balance) for estimate, balance in zip(found, analysis.balances, strict=True)]
    if len(found) == 1 or verdicts[0] == verdicts[1]:
        verdict = verdicts[0]
    else:
        verdict = f"{verdicts[0]} by the trained rewards, {verdicts[1].lower()} by what was not trained on"
    return Finding(question, verdict, " ".join(texts))


def findings(analysis: Analysis) -> list[Finding]:
    """Everything else that the methods of the grid allow to ask."""
    made = [
        _degrades(analysis), _halves(analysis), _timing(analysis), _better(analysis), _hacking(analysis),
        _copying(analysis),
    ]  # fmt: skip
    return [finding for finding in made if finding is not None]


def _degrades(analysis: Analysis) -> Finding | None:
    """Does the baseline lose in one reward what it wins in the other?"""
    baseline = analysis.grid.baseline
    if baseline not in analysis.methods:
        return None
    measured = [*analysis.comparison.rewards]
    for balance in analysis.balances[1:]:
        measured += balance.metrics
    gains = {metric: analysis.gain(baseline, metric) for metric in measured}
    fell = [words(metric) for metric, gain in gains.items() if gain.verdict == "fell"]
    unclear = any(gain.verdict == "unclear" for gain in gains.values())
    verdict = "Yes" if fell else "Undecided" if unclear else "No"
    question = f"Does {analysis.comparison.title(baseline)} degrade one reward?"
    text = f"{listed(fell)} fell. " if fell else "Nothing clearly fell. "
    return Finding(question, verdict, text + _gains(gains))


def _halves(analysis: Analysis) -> Finding | None:
    """Which half of Customized-GRPO does the work, against the z-sum that has neither?"""
    neither, halves = "zsum_1to1", [m for m in ("sars", "tdw") if m in analysis.methods]
    if neither not in analysis.methods or not halves or not analysis.balances:
        return None
    both = [m for m in (analysis.grid.candidate,) if m in analysis.methods]
    found = _compared(analysis, [*halves, *both], neither)
    works = [analysis.comparison.title(m) for m in halves if found[m].verdict == "rose"]
    verdict = listed(works) if works else "Neither half clearly does"
    return Finding("Which half does the work?", verdict, _table(analysis, found, neither))


def _timing(analysis: Analysis) -> Finding | None:
    """Prompt early, at the true step: against constant weights, mirrored, and looked up by loop index."""
    candidate = analysis.grid.candidate
    controls = [m for m in ("sars", "customized_reversed", "tdw_loop_index") if m in analysis.methods]
    if candidate not in analysis.methods or not controls or not analysis.balances:
        return None
    balance = analysis.balances[0]
    found = {m: analysis.lesser_gain_difference(candidate, m, balance) for m in controls}
    beaten = [analysis.comparison.title(m) for m in controls if found[m].verdict == "rose"]
    lost = [analysis.comparison.title(m) for m in controls if found[m].verdict == "fell"]
    verdict = "Yes" if len(beaten) == len(controls) else "No" if lost else "Undecided" if not beaten else "In part"
    title = analysis.comparison.title
    text = "; ".join(f"against {title(m)} {_interval(found[m])}" for m in controls)
    return Finding("Does it matter when which reward counts?", verdict, f"Lesser gain of {title(candidate)} {text}.")


def _better(analysis: Analysis) -> Finding | None:
    """Is anything better than the candidate?"""
    candidate = analysis.grid.candidate
    others = [m for m in analysis.methods if m != candidate]
    if candidate not in analysis.methods or not others or not analysis.balances:
        return None
    found = _compared(analysis, others, candidate)
    better = [m for m in others if found[m].verdict == "rose"]
    title = analysis.comparison.title
    text = f"Of {len(others)} methods, {listed([title(m) for m in better]) if better else 'none'} clearly: "
    best = max(others, key=lambda m: np.nan_to_num(found[m].value, nan=-np.inf))
    text += f"the best lesser gain is that of {title(best)}, {_interval(found[best])} against {title(candidate)}."
    if len(others) > 1:
        text += (
            f" Of {len(others)} comparisons at 95 %, {0.025 * len(others):.1f} would come out better by chance alone."
        )
    return Finding(f"Is anything better than {title(candidate)}?", "Yes" if better else "Nothing clearly is", text)


def _hacking(analysis: Analysis) -> Finding | None:
    """Do the rewards rise further than what they stand for?"""
    shown = [m for m in (analysis.grid.candidate, analysis.grid.baseline) if m in analysis.methods]
    gaps = {(m, r): analysis.hacking_gap(m, r) for m in shown for r in analysis.comparison.rewards}
    gaps = {key: gap for key, gap in gaps.items() if np.isfinite(gap.value)}
    if not gaps:
        return None
    hacked = [key for key, gap in gaps.items() if gap.verdict == "rose"]
    unclear = any(gap.verdict == "unclear" for gap in gaps.values())
    title = analysis.comparison.title
    text = "; ".join(f"{words(r)} under {title(m)} {_interval(gap)}" for (m, r), gap in gaps.items())
    return Finding(
        "Are the rewards hacked?", "Yes" if hacked else "Undecided" if unclear else "No",
        f"Gain of a reward less the gain of its untrained twin, in spreads: {text}.",
    )  # fmt: skip


def _copying(analysis: Analysis) -> Finding | None:
    """Is the reference pasted?"""
    metrics = [metric for metric in analysis.metrics if metric in analysis.grid.lower_is_better]
    shown = [m for m in (analysis.grid.candidate, analysis.grid.baseline) if m in analysis.methods]
    if not metrics or not shown:
        return None
    gains = {(m, k): analysis.gain(m, k) for m in shown for k in metrics}
    rose = sorted({analysis.comparison.title(m) for (m, _), gain in gains.items() if gain.verdict == "rose"})
    title = analysis.comparison.title
    text = "; ".join(f"{words(k)} under {title(m)} {_interval(gain)}" for (m, k), gain in gains.items())
    verdict = f"More than before by {listed(rose)}" if rose else "Not clearly more than before"
    return Finding("Is the reference copied?", verdict, f"Change since the base policy: {text}.")


def _compared(analysis: Analysis, methods: Sequence[str], reference: str) -> dict[str, Estimate]:
    return {m: analysis.lesser_gain_difference(m, reference, analysis.balances[0]) for m in methods}


def _table(analysis: Analysis, found: dict[str, Estimate], reference: str) -> str:
    title = analysis.comparison.title
    parts = [f"{title(m)} {_interval(estimate)}" for m, estimate in found.items()]
    return f"Lesser gain against {title(reference)}: {'; '.join(parts)}."


def _against(estimate: Estimate, balance: Balance) -> str:
    names = listed([words(metric) for metric in balance.metrics])
    which = f"gains in {names}" if balance.name == "rewards" else f"gains in {names}, which no method trained on,"
    if not np.isfinite(estimate.value):
        return f"The lesser of the {which} is not known."
    how = {"rose": "larger by", "fell": "smaller by", "unclear": "not clearly different:"}[estimate.verdict]
    value = Estimate(-estimate.value, -estimate.high, -estimate.low) if estimate.verdict == "fell" else estimate
    sign = _interval(value) if estimate.verdict == "unclear" else _interval(value).replace("+", "")
    return f"The lesser of its {which} is {how} {sign} spreads of the base policy."


def _gains(gains: dict[str, Estimate]) -> str:
    return "; ".join(f"{words(metric)} {_interval(gain)}" for metric, gain in gains.items()) + "."


def _interval(estimate: Estimate) -> str:
    if not np.isfinite(estimate.value):
        return number(float("nan"))
    if not np.isfinite(estimate.low):
        return f"{signed(estimate.value)} (no interval)"
    return f"{signed(estimate.value)} [{signed(estimate.low)}, {signed(estimate.high)}]"
