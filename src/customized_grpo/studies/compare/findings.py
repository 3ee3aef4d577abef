"""What the numbers show, in words. A sentence claims a difference only where the interval is clear of zero."""

import numpy as np

from customized_grpo.page import Estimate, Finding
from customized_grpo.page.formats import listed, signed, words
from customized_grpo.studies.compare.analysis import Analysis, Balance

VERDICT = {"rose": "Yes", "fell": "No", "unclear": "Undecided"}


def headline(analysis: Analysis) -> Finding:
    """Does the candidate beat the baseline? By the worst-reward gain, and by that of the held-out proxies."""
    grid, title = analysis.grid, analysis.comparison.title
    question = f"Does {title(grid.candidate)} beat {title(grid.baseline)} on held-out subjects?"
    missing = [title(m) for m in (grid.candidate, grid.baseline) if m not in analysis.methods]
    if missing:
        return Finding(question, "Not yet known", f"No finished run of {listed(missing)}.")
    if not analysis.balances:
        return Finding(question, "Not defined", "The worst-reward gain needs two rewards; see the differences below.")
    found = [analysis.lesser_gain_difference(grid.candidate, grid.baseline, balance) for balance in analysis.balances]
    verdicts = [VERDICT[estimate.verdict] for estimate in found]
    texts = [_against(estimate, balance) for estimate, balance in zip(found, analysis.balances, strict=True)]
    if len(found) == 1 or verdicts[0] == verdicts[1]:
        verdict = verdicts[0]
    else:
        verdict = f"{verdicts[0]} by the trained rewards, {verdicts[1].lower()} by the held-out proxies"
    if analysis.num_seeds < 2:
        verdict += ", for this one seed"
    return Finding(question, verdict, " ".join(texts))


def findings(analysis: Analysis) -> list[Finding]:
    """The other questions that the methods of the grid can answer."""
    made = [
        _degrades(analysis), _halves(analysis), _timing(analysis), _better(analysis), _beyond(analysis),
        _hacking(analysis), _copying(analysis),
    ]  # fmt: skip
    return [finding for finding in made if finding is not None]


def _degrades(analysis: Analysis) -> Finding | None:
    """Does the baseline lose on one side what it wins on the other?"""
    baseline, title = analysis.grid.baseline, analysis.comparison.title
    if baseline not in analysis.methods:
        return None
    measured = [*analysis.comparison.rewards]
    for balance in analysis.balances[1:]:
        measured += balance.metrics
    gains = {metric: analysis.gain(baseline, metric) for metric in measured}
    fell = [words(metric) for metric, gain in gains.items() if gain.verdict == "fell"]
    unclear = any(gain.verdict == "unclear" for gain in gains.values())
    verdict = f"Yes, {listed(fell)} fell" if fell else "Undecided" if unclear else "No"
    numbers = tuple((words(metric), gain) for metric, gain in gains.items())
    return Finding(f"Does {title(baseline)} make anything worse?", verdict, "Change since the base policy:", numbers)


def _halves(analysis: Analysis) -> Finding | None:
    """Which half of Customized-GRPO is responsible, compared with the z-sum that has neither?"""
    neither, halves = "zsum_1to1", [m for m in ("sars", "tdw") if m in analysis.methods]
    if neither not in analysis.methods or not halves or not analysis.balances:
        return None
    title = analysis.comparison.title
    both = [m for m in (analysis.grid.candidate,) if m in analysis.methods]
    found = {m: _lesser(analysis, m, neither) for m in [*halves, *both]}
    works = [title(m) for m in halves if found[m].verdict == "rose"]
    verdict = listed(works) if works else "Neither clearly is"
    numbers = tuple((title(m), estimate) for m, estimate in found.items())
    return Finding(
        "Which half of the method is responsible?",
        verdict,
        f"Worst-reward gain minus that of {title(neither)}:",
        numbers,
    )


def _timing(analysis: Analysis) -> Finding | None:
    """Prompt early, at the true step: against constant weights, mirrored, and looked up by loop index."""
    candidate, title = analysis.grid.candidate, analysis.comparison.title
    controls = [m for m in ("sars", "customized_reversed", "tdw_loop_index") if m in analysis.methods]
    if candidate not in analysis.methods or not controls or not analysis.balances:
        return None
    found = {m: _lesser(analysis, candidate, m) for m in controls}
    beaten = [m for m in controls if found[m].verdict == "rose"]
    lost = [m for m in controls if found[m].verdict == "fell"]
    verdict = "Yes" if len(beaten) == len(controls) else "No" if lost else "In part" if beaten else "Undecided"
    names = {"sars": "constant weights", "customized_reversed": "identity early", "tdw_loop_index": "by loop index"}
    numbers = tuple((f"against {names[m]}", found[m]) for m in controls)
    text = f"Worst-reward gain of {title(candidate)} minus that of its controls:"
    return Finding("Does prompt early, at the true step, help?", verdict, text, numbers)


def _better(analysis: Analysis) -> Finding | None:
    """Is anything better than the candidate?"""
    candidate, title = analysis.grid.candidate, analysis.comparison.title
    others = [m for m in analysis.methods if m != candidate]
    if candidate not in analysis.methods or not others or not analysis.balances:
        return None
    found = {m: _lesser(analysis, m, candidate) for m in others}
    better = [title(m) for m in others if found[m].verdict == "rose"]
    text = f"Worst-reward gain minus that of {title(candidate)}; the best of {len(others)}"
    if len(others) > 1:
        text += f", of which {0.025 * len(others):.1f} would be better by chance alone"
    numbers = tuple((title(m), found[m]) for m in _best(found))
    verdict = f"Yes, {listed(better)}" if better else "Nothing clearly is"
    return Finding(f"Is anything better than {title(candidate)}?", verdict, f"{text}:", numbers)


def _beyond(analysis: Analysis) -> Finding | None:
    """Does a method do what no constant weights would have done?"""
    title, line = analysis.comparison.title, analysis.line
    if line is None or not analysis.balances:
        return None
    found = {m: analysis.beyond(m, analysis.balances[0]) for m in analysis.methods if m not in line}
    if not found:
        return None
    beyond = [title(m) for m, estimate in found.items() if estimate.verdict == "rose"]
    shown = dict.fromkeys([m for m in reversed(analysis.references) if m in found] + _best(found))
    verdict = f"Better: {listed(beyond)}" if beyond else "None is clearly better"
    text = f"Distance in standard deviations beyond the line through {title(line[0])} and {title(line[1])}:"
    numbers = tuple((title(m), found[m]) for m in shown)
    return Finding("Is a method better, or does it only weight the rewards differently?", verdict, text, numbers)


def _hacking(analysis: Analysis) -> Finding | None:
    """Do the rewards rise more than their held-out proxies?"""
    title = analysis.comparison.title
    shown = analysis.references[::-1]
    gaps = {(m, r): analysis.hacking_gap(m, r) for m in shown for r in analysis.comparison.rewards}
    gaps = {key: gap for key, gap in gaps.items() if np.isfinite(gap.value)}
    if not gaps:
        return None
    hacked = any(gap.verdict == "rose" for gap in gaps.values())
    unclear = any(gap.verdict == "unclear" for gap in gaps.values())
    numbers = tuple((f"{words(r)}, {title(m)}", gap) for (m, r), gap in gaps.items())
    return Finding(
        "Do rewards rise more than their held-out proxies?", "Yes" if hacked else "Undecided" if unclear else "No",
        "Gain of a reward minus that of its held-out proxy, in standard deviations:", numbers,
    )  # fmt: skip


def _copying(analysis: Analysis) -> Finding | None:
    """Is the reference pasted?"""
    title = analysis.comparison.title
    metrics = [metric for metric in analysis.metrics if metric in analysis.grid.lower_is_better]
    shown = analysis.references[::-1]
    if not metrics or not shown:
        return None
    gains = {(m, k): analysis.gain(m, k) for m in shown for k in metrics}
    rose = list(dict.fromkeys(title(m) for (m, _), gain in gains.items() if gain.verdict == "rose"))
    numbers = tuple((f"{words(k)}, {title(m)}", gain) for (m, k), gain in gains.items())
    verdict = f"More than before by {listed(rose)}" if rose else "Not clearly more than before"
    return Finding("Is the reference copied?", verdict, "Change since the base policy:", numbers)


def _best(found: dict[str, Estimate]) -> list[str]:
    """The three methods with the most, best first."""
    return sorted(found, key=lambda m: -np.nan_to_num(found[m].value, nan=-np.inf))[:3]


def _lesser(analysis: Analysis, method: str, reference: str) -> Estimate:
    return analysis.lesser_gain_difference(method, reference, analysis.balances[0])


def _against(estimate: Estimate, balance: Balance) -> str:
    names = listed([words(metric) for metric in balance.metrics])
    which = f"gains in {names}" if balance.name == "rewards" else f"gains in {names}, which no method was trained on,"
    if not np.isfinite(estimate.value):
        return f"The smaller of the {which} is not known."
    low, high = signed(estimate.low), signed(estimate.high)
    interval = f" [{low}, {high}]" if np.isfinite(estimate.low) else " (no interval)"
    how = {"rose": "larger:", "fell": "smaller:", "unclear": "not clearly different:"}[estimate.verdict]
    return f"The smaller of its {which} is {how} {signed(estimate.value)}{interval} standard deviations."
