"""What the numbers show, in words. A sentence claims a difference only where the interval is clear of zero."""

from collections.abc import Iterator, Sequence

import numpy as np

from customized_grpo.page import Estimate, Finding
from customized_grpo.page.formats import listed, signed, words
from customized_grpo.settings.identity import differences
from customized_grpo.studies.compare.analysis import Comparison
from customized_grpo.studies.compare.grid import of_each_method

VERDICT = {"rose": "Yes", "fell": "No", "unclear": "Undecided"}
ADVANTAGE, WEIGHTS = {"method.advantage"}, {"method.time_weights"}
Numbers = Sequence[tuple[str, Estimate]]


def headline(a: Comparison) -> Finding:
    """Does the candidate beat the baseline? By the worst-reward gain, and by that of the held-out proxies."""
    baseline, candidate = a.grid.baseline, a.grid.candidate
    question = f"Does {a.title(candidate)} beat {a.title(baseline)} on held-out subjects?"
    if missing := [a.title(m) for m in (candidate, baseline) if m not in a.methods]:
        return Finding(question, "Not yet known", f"No finished run of {listed(missing)}.")
    if not a.pairs:
        return Finding(question, "Not defined", "The worst-reward gain needs two rewards; see the differences below.")
    found = [a.worst_gain(pair, candidate, baseline) for pair in a.pairs.values()]
    verdicts = list(dict.fromkeys(VERDICT[estimate.verdict] for estimate in found))
    verdict = verdicts[0]
    if len(verdicts) > 1:
        verdict = f"{verdict} by the trained rewards, {verdicts[1].lower()} by the held-out proxies"
    if a.num_seeds < 2:
        verdict += ", for this one seed"
    return Finding(question, verdict, " ".join(map(_sentence, found, a.pairs, a.pairs.values())))


def _sentence(estimate: Estimate, name: str, pair: Sequence[str]) -> str:
    which = f"gains in {listed([words(k) for k in pair])}{', which no method was trained on,' * (name == 'checks')}"
    if not np.isfinite(estimate.value):
        return f"The smaller of the {which} is not known."
    low, high = signed(estimate.low), signed(estimate.high)
    interval = f"[{low}, {high}]" if np.isfinite(estimate.low) else "(no interval)"
    how = {"rose": "larger", "fell": "smaller", "unclear": "not clearly different"}[estimate.verdict]
    return f"The smaller of its {which} is {how}: {signed(estimate.value)} {interval} standard deviations."


def findings(a: Comparison) -> list[Finding]:
    """The other questions that the methods of the grid can answer."""
    asked = [_degrades, *([_halves, _timing, _better, _beyond] if a.pairs else []), _hacking, _copying]
    return [finding for ask in asked for finding in ask(a)]


def _degrades(a: Comparison) -> Iterator[Finding]:
    """Does the baseline lose on one side what it wins on the other?"""
    baseline = a.grid.baseline
    if baseline in a.methods:
        gains = [(words(k), a.gain(k, baseline)) for k in a.judged]
        fell = _labels(gains, "fell")
        verdict = f"Yes, {listed(fell)} fell" if fell else "Undecided" if _labels(gains, "unclear") else "No"
        yield Finding(f"Does {a.title(baseline)} make anything worse?", verdict, "Change since the base policy:", gains)


def _halves(a: Comparison) -> Iterator[Finding]:
    """Which half of the candidate is responsible: its advantage or its time weights?

    A half is a method with one of the two. Both are compared with a method that shares the other part of each.
    """
    candidate = a.grid.candidate
    for neither in a.methods if candidate in a.methods else ():
        one = [m for m in _controls(a, WEIGHTS) if _changes(a, neither, m) == ADVANTAGE]
        other = [m for m in _controls(a, ADVANTAGE) if _changes(a, neither, m) == WEIGHTS]
        if one and other:
            found = [(a.title(m), a.worst_gain(a.pairs["rewards"], m, neither)) for m in (*one, *other, candidate)]
            works = _labels(found[:-1], "rose")
            yield Finding(
                f"Which half of {a.title(candidate)} is responsible?", listed(works) if works else "Neither clearly is",
                f"Worst-reward gain minus that of {a.title(neither)}:", found,
            )  # fmt: skip


def _timing(a: Comparison) -> Iterator[Finding]:
    """Do the time weights of the candidate help, against methods that differ from it in them alone?"""
    candidate = a.grid.candidate
    if controls := _controls(a, WEIGHTS):
        found = [(f"against {a.title(m)}", a.worst_gain(a.pairs["rewards"], candidate, m)) for m in controls]
        beaten, lost = _labels(found, "rose"), _labels(found, "fell")
        verdict = "Yes" if len(beaten) == len(controls) else "No" if lost else "In part" if beaten else "Undecided"
        text = f"Worst-reward gain of {a.title(candidate)} minus that of methods with other time weights:"
        yield Finding(f"Do the time weights of {a.title(candidate)} help?", verdict, text, found)


def _better(a: Comparison) -> Iterator[Finding]:
    """Is anything better than the candidate?"""
    candidate = a.grid.candidate
    others = [m for m in a.methods if m != candidate]
    if candidate in a.methods and others:
        found = [(a.title(m), a.worst_gain(a.pairs["rewards"], m, candidate)) for m in others]
        better = _labels(found, "rose")
        verdict = f"Yes, {listed(better)}" if better else "Nothing clearly is"
        chance = f", of which {0.025 * len(others):.1f} would be better by chance alone" * (len(others) > 1)
        text = f"Worst-reward gain minus that of {a.title(candidate)}; the best of {len(others)}{chance}:"
        yield Finding(f"Is anything better than {a.title(candidate)}?", verdict, text, _best(found))


def _beyond(a: Comparison) -> Iterator[Finding]:
    """Does a method do what no constant weights would have done?"""
    found = {m: a.beyond(a.pairs["rewards"], m) for m in a.methods if a.line and m not in a.line}
    if found:
        numbers = [(a.title(m), estimate) for m, estimate in found.items()]
        beyond = _labels(numbers, "rose")
        verdict = f"Better: {listed(beyond)}" if beyond else "None is clearly better"
        shown = dict([(a.title(m), found[m]) for m in reversed(a.references) if m in found] + _best(numbers))
        text = f"Distance in standard deviations beyond the line through {listed([a.title(m) for m in a.line])}:"
        question = "Is a method better, or does it only weight the rewards differently?"
        yield Finding(question, verdict, text, list(shown.items()))


def _hacking(a: Comparison) -> Iterator[Finding]:
    """Do the rewards rise more than their held-out proxies?"""
    gaps = [(f"{words(r)}, {a.title(m)}", a.hacking_gap(r, m)) for m in reversed(a.references) for r in a.rewards]
    gaps = [(label, gap) for label, gap in gaps if np.isfinite(gap.value)]
    if gaps:
        verdict = "Yes" if _labels(gaps, "rose") else "Undecided" if _labels(gaps, "unclear") else "No"
        text = "Gain of a reward minus that of its held-out proxy, in standard deviations:"
        yield Finding("Do rewards rise more than their held-out proxies?", verdict, text, gaps)


def _copying(a: Comparison) -> Iterator[Finding]:
    """Is the reference pasted?"""
    metrics = [metric for metric in a.metrics if metric in a.grid.lower_is_better]
    gains = {(m, k): a.gain(k, m) for m in reversed(a.references) for k in metrics}
    if gains:
        rose = list(dict.fromkeys(a.title(m) for (m, _), gain in gains.items() if gain.verdict == "rose"))
        verdict = f"More than before by {listed(rose)}" if rose else "Not clearly more than before"
        numbers = [(f"{words(k)}, {a.title(m)}", gain) for (m, k), gain in gains.items()]
        yield Finding("Is the reference copied?", verdict, "Change since the base policy:", numbers)


def _labels(numbers: Numbers, verdict: str) -> list[str]:
    return [label for label, estimate in numbers if estimate.verdict == verdict]


def _best(numbers: Numbers) -> list[tuple[str, Estimate]]:
    """The three largest, in order."""
    return sorted(numbers, key=lambda number: -np.nan_to_num(number[1].value, nan=-np.inf))[:3]


def _controls(a: Comparison, part: set[str]) -> list[str]:
    """The methods that differ from the candidate in one part alone."""
    return [m for m in a.methods if a.grid.candidate in a.methods and _changes(a, a.grid.candidate, m) == part]


def _changes(a: Comparison, one: str, other: str) -> set[str]:
    """The settings in which two methods differ, without their arguments."""
    config = {cell.method: cell.config for cell in of_each_method(a.cells)}
    return {".".join(name.split(".")[:2]) for name in differences(config[one], config[other])} - {"output"}
