"""The report of one run: what it contains, and in which order."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from customized_grpo import page
from customized_grpo.page.formats import count, duration, number, summary, words
from customized_grpo.store.run import RunRecord, image_of, iteration_files, read_run
from customized_grpo.store.scores import Change, since_first
from customized_grpo.studies.report.groups import group_blocks
from customized_grpo.studies.report.remarks import (
    CLAMP_LIMIT,
    CLIP_LIMIT,
    NORM_LIMIT,
    R_LIMIT,
    RATIO_TOLERANCE,
    remarks,
)
from customized_grpo.studies.report.verdict import Verdict, kind_name

STAGES = ("rollout", "decode", "rewards", "update", "evaluation", "other")

MOST_PAIRS = 12
"""Rows of images: the worst and the best, half of each. All of them are in RUN/samples."""


@dataclass(frozen=True)
class Stage:
    """One row of the timing table, in seconds."""

    name: str
    total: float
    per_iteration: float
    share: float


@dataclass(frozen=True)
class Vital:
    """One diagnostic of the update: metric key, title, what to look for, and its healthy band if there is one."""

    key: str
    title: str
    hint: str
    band: tuple[float, float] | None = None
    logarithmic: bool = False


VITALS = (
    Vital("update/clip_share", "Clip share", "share of steps whose gradient the clip stops", (-np.inf, CLIP_LIMIT)),
    Vital("update/ratio_max", "Largest ratio", "new / old probability; leaves 1 slowly"),
    Vital("update/first_ratio_error", "First ratio error", "must be about 0", (-np.inf, RATIO_TOLERANCE)),
    Vital("update/kl", "KL to the base policy", "nats per latent element, or of velocities", logarithmic=True),
    Vital(
        "update/velocity_norm",
        "Velocity norm",
        "over the base policy's or the first; stays near 1",
        (-np.inf, NORM_LIMIT),
    ),
    Vital("nft/r_std", "Spread of r", "0.5 at most; near 0 teaches little", (R_LIMIT, 0.5)),
    Vital("update/grad_norm", "Gradient norm", "before clipping", logarithmic=True),
    Vital("update/learning_rate", "Learning rate", ""),
    Vital("update/loss", "Loss", "a lower one is no progress"),
    Vital("advantage/std", "Advantage spread", "standard scores; about 1"),
    Vital("advantage/clamped", "Advantages clamped", "share", (-np.inf, CLAMP_LIMIT)),
    Vital("memory/peak_gib", "Peak memory", "GiB; should be flat"),
)


def write_report(run: Path, status: str | None = None) -> Path:
    """Write RUN/report.html, self-contained, the same as report.md, and the plots as SVG and PNG into RUN/plots.

    Works on a run that is still going, was killed, or was never evaluated: the page says what is missing.

    Args:
        run: the folder that training wrote.
        status: how the run ended, if run.json does not say it yet; None reads it there.

    Returns:
        The path of the report.

    Raises:
        UserError: if the folder holds no run or cannot be written.
    """
    record = read_run(run)
    if status is not None:
        record = replace(record, info={**record.info, "status": status})
    return page.publish(contents(record), record.folder)


def contents(record: RunRecord) -> page.Page:
    """The page of a run. Writes the plots."""
    verdict = compared(record)
    problems: list[str] = []
    groups = group_blocks(record, problems)
    images = [*pairs_of_images(record, verdict, problems), *sample_grid(record, problems)]
    answer, lead = headline(record, verdict)
    return page.Page(
        kind="Training report",
        title=record.name,
        badges=[progress(record)],
        headline=answer,
        lead=lead,
        summary=[page.Remarks(remarks(record, verdict, problems))],
        sections=[
            page.Section("Images", images or [page.Text("No sample grids have been written.", "soft")]),
            page.Section("Before and after, by kind of prompt", change_blocks(record, verdict), name="By kind"),
            page.Section("Rewards over training", reward_blocks(record), name="Rewards"),
            page.Section("Conflict between the rewards", conflict_blocks(record), name="Conflict"),
            page.Section("What the update prefers", groups, name="Groups"),
            page.Section("Health of the update", update_blocks(record), name="Update"),
            page.Section("Where the time went", time_blocks(record), name="Time"),
            page.Section("The run", page.origin(record.info, facts(record), record.config)),
        ],
        footer="Plots are beside this page in plots/ as SVG and PNG. docs/metrics.md explains every metric.",
    )


def change_blocks(record: RunRecord, verdict: Verdict | None) -> list[page.Block]:
    """The metrics before and after training, by kind of prompt if there are several."""
    if verdict is None or not verdict.changes:
        return [page.Text("There are no two evaluations to compare.", "soft")]
    first, last = verdict.before.iteration, verdict.after.iteration
    note = (
        f"Before (iteration {first}) → after (iteration {last}) on the same {max(c.tasks for c in verdict.changes)} "
        f"held-out tasks of {verdict.subjects} subjects with the same noise; where an image scores 0 or 1, images are "
        f"counted. Below it the paired change and its 95 % interval, bootstrapped over subjects. It does not cover the "
        f"training seed: another seed can give another change. * Not trained on: reward hacking shows as a fall here."
    )
    table = [verdict.table()] if verdict.by_kind else change_cards(record, verdict)
    return [*table, page.Text(note, "note"), *_kind_curves(record)]


def change_cards(record: RunRecord, verdict: Verdict) -> list[page.Block]:
    """The metrics over all tasks, those that were trained on first."""
    colours = dict(zip(record.metrics, _colours(record.metrics), strict=True))

    def cards(changes: Sequence[Change]) -> page.Cards:
        return page.Cards([
            page.Card(words(c.metric), c.after.value, c.before.value, c.difference, colour=colours[c.metric])
            for c in changes
        ])  # fmt: skip

    found: list[page.Block] = [cards(verdict.trained)]
    return [*found, page.Text("Not trained on:", "soft"), cards(verdict.untrained)] if verdict.untrained else found


def _kind_curves(record: RunRecord) -> list[page.Block]:
    """A plot for each metric with a line for each kind."""
    kinds = record.evaluations[0].distinct_kinds()
    if len(record.evaluations) < 2 or not kinds:
        return []
    evaluated = [scores.iteration for scores in record.evaluations]
    parts = {kind: [scores.of_kind(kind) for scores in record.evaluations] for kind in kinds}
    found = []
    for metric in record.metrics:
        lines = {kind_name(kind): since_first(part, metric) for kind, part in parts.items()}
        figure = page.plots.by_kind(evaluated, lines, ylabel=words(metric))
        last = "; ".join(f"{kind} {number(line[-1].value)}" for kind, line in lines.items())
        title, file = f"{words(metric)} by kind", f"kinds-{metric}"
        found.append(page.embed_plot(figure, record.folder, file, title=title, alt=f"{title}, at the end: {last}"))
    explained = "Held-out evaluations. The bars at the end are the 95 % intervals of the change since the first."
    return [page.Text(explained), page.Figures(found)]


def pairs_of_images(record: RunRecord, verdict: Verdict | None, problems: list[str]) -> list[page.Block]:
    """Reference, image of the first and image of the last evaluation: the tasks that changed worst and best."""
    cells = record.folder / "samples" / "cells"
    shown = sorted({iteration for iteration, _ in iteration_files(cells, ".png", "*-")})
    if len(shown) < 2:
        return []
    stages = [f"iteration-{iteration:06d}" for iteration in (shown[0], shown[-1])]
    last = record.evaluations[-1] if record.evaluations else None
    tasks = dict(enumerate(zip(last.kinds, last.prompts, strict=True))) if last else {}
    gains = verdict.gains() if verdict else {}
    order, rows = [], {}
    numbers = {path.name.split("-")[0] for path in cells.glob("*-reference.*")}
    for place in sorted(int(number_) for number_ in numbers if number_.isdecimal()):
        paths = [image_of(cells, place, what) for what in ("reference", *stages)]
        if not all(path.exists() for path in paths) or sum(not _is_image(path, problems) for path in paths):
            continue
        gain, told = gains.get(place, (np.nan, ""))
        kind, prompt = tasks.get(place, (None, ""))
        if (file := cells / f"{place:03d}-prompt.txt").exists():
            prompt = file.read_text(encoding="utf-8", errors="replace")
        rank = ", ".join(filter(None, ["" if kind is None else kind_name(kind), told]))
        rows[place] = page.Shown(prompt, rank, [(path, _marks(path.with_suffix(".json"))) for path in paths])
        order.append((gain, place))
    ranked = [place for _, place in sorted(order, key=lambda pair: (np.isnan(pair[0]), pair))]
    half = MOST_PAIRS // 2
    chosen = ranked if len(ranked) <= MOST_PAIRS else [*ranked[:half], *ranked[-half:]]
    first = "base" if shown[0] == 0 else f"iteration {shown[0]}"
    headers = ["reference", first, f"tuned, iteration {shown[-1]}"]
    which = f"The {half} worst and the {half} best of all" if len(chosen) < len(ranked) else "All"
    those = "evaluated tasks" if tasks.keys() == rows.keys() else "tasks whose images are kept"
    rule = f"{which} {len(ranked)} {those}, drawn from the same noise."
    if gains:
        rule += (
            " The worst are first: a task is ranked by the deciding metric that fell most in this image (in brackets), "
            "in standard deviations over the tasks of the first evaluation."
        )
    grid = page.image_grid(headers, [rows[place] for place in chosen], record.folder)
    return [page.Text(rule, "note"), grid] if chosen else []


def _is_image(path: Path, problems: list[str]) -> bool:
    """Whether a file can be read as an image; if not, it is named."""
    try:
        page.thumbnail(path, 8)
    except (OSError, SyntaxError):
        problems.append(f"samples/cells/{path.name} could not be read as an image.")
        return False
    return True


def _marks(file: Path) -> list[str]:
    """What a metric says is right and wrong in an image."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return [f"{'✓' if right else '✗'} {what}" for what, right in found.items()]
    except (OSError, ValueError, AttributeError):
        return []


def reward_blocks(record: RunRecord) -> list[page.Block]:
    explained = (
        "Thin: the mean over the samples of an iteration, with the standard deviation within groups as a band. It "
        "moves with the prompts that were drawn and with the noise of exploration. Dots: the held-out evaluation, the "
        "one to judge by; its bars are the 95 % interval of the change since the first evaluation (dashed line), so a "
        "bar clear of the line is a clear change."
    )
    return _with_text(explained, reward_plots(record), "No rewards have been logged.")


def conflict_blocks(record: RunRecord) -> list[page.Block]:
    explained = (
        "Within a group, one reward can put a sample above the mean while the other puts it below: a conflict. "
        "Unrelated rewards conflict on half of the samples; more means that they compete."
    )
    return _with_text(explained, conflict_plots(record), "Conflict needs two rewards and a logged iteration.")


def update_blocks(record: RunRecord) -> list[page.Block]:
    drawn, constant = update_plots(record), constant_vitals(record)
    blocks: list[page.Block] = [page.Figures(drawn, "small")] if drawn else []
    if constant:
        told = ", ".join(f"{title.lower()} {number(value)}" for title, value in constant)
        blocks.append(page.Text(f"Constant throughout: {told}.", "note"))
    return blocks or [page.Text("No update has been logged.", "soft")]


def time_blocks(record: RunRecord) -> list[page.Block]:
    rows = [
        page.Row(s.name, (duration(s.per_iteration), duration(s.total), f"{s.share:.1%}", page.Bar(s.share)))
        for s in stages(record)
    ]
    if not rows:
        return [page.Text("No times have been logged.", "soft")]
    return [page.Table(("per iteration", "in all", "share", ""), rows, first="stage")]


def _with_text(text: str, figures: Sequence[page.Figure], absent: str) -> list[page.Block]:
    return [page.Text(text), page.Figures(figures)] if figures else [page.Text(absent, "soft")]


def compared(record: RunRecord) -> Verdict | None:
    """First against last evaluation; None without two of them."""
    if len(record.evaluations) < 2:
        return None
    return Verdict(record.evaluations[0], record.evaluations[-1])


def headline(record: RunRecord, verdict: Verdict | None) -> tuple[str, str]:
    """The answer in one sentence, and what qualifies it."""
    if not record.evaluations:
        return "No held-out evaluation yet.", "Whether training helps can only be said from held-out evaluations."
    if verdict is None:
        at = record.evaluations[-1].iteration
        return (
            f"One held-out evaluation so far, at iteration {at}.",
            f"There is nothing to compare it with; the levels: {summary(record.evaluations[-1])}.",
        )
    if not verdict.changes:
        return "No image was scored in both evaluations.", "The rewards could not score any."
    return verdict.headline()


def progress(record: RunRecord) -> str:
    """How far the run came, in words."""
    done = int(record.iterations[-1]) if record.rows else 0
    planned = record.planned_iterations
    of = f" of {planned}" if planned else ""
    return f"{record.status}, iteration {done}{of}" if record.status != "finished" else f"finished, {done} iterations"


def reward_plots(record: RunRecord) -> list[page.Figure]:
    """A curve for every reward and every other metric; the trade-off where there are two rewards."""
    evaluated = [evaluation.iteration for evaluation in record.evaluations]
    found = []
    for metric, colour in zip(record.metrics, _colours(record.metrics), strict=True):
        mean, std = record.series(f"reward/{metric}/mean"), record.series(f"reward/{metric}/spread")
        levels = since_first(record.evaluations, metric)
        if not np.isfinite(mean).any() and not any(np.isfinite(x.value) for x in levels):
            continue
        figure = page.plots.training_curve(
            record.iterations, mean, std, evaluated, levels, colour=colour, ylabel=words(metric)
        )
        title = f"{words(metric)}" + ("" if metric in record.rewards else " (not trained on)")
        held_out = (f"{number(x.value)} at iteration {at}" for at, x in zip(evaluated, levels, strict=True))
        alt = f"{title} over training; held out: {', '.join(held_out) or 'not evaluated'}"
        found.append(page.embed_plot(figure, record.folder, f"reward-{metric}", title=title, alt=alt))
    if len(record.rewards) == 2:
        up, across = record.rewards
        path = zip(evaluated, *(since_first(record.evaluations, metric) for metric in (across, up)), strict=True)
        shown = [point for point in path if np.isfinite([point[1].value, point[2].value]).all()]
        if len(shown) > 1:
            at, x, y = zip(*shown, strict=True)
            track = page.plots.Track(f"iteration {at[-1]}", x, y)
            figure = page.plots.plane(
                [track], (x[0].value, y[0].value), start=f"iteration {at[0]}", xlabel=words(across), ylabel=words(up)
            )
            found.append(page.embed_plot(figure, record.folder, "trade-off", title="Trade-off between the two rewards"))
    return found


def conflict_plots(record: RunRecord) -> list[page.Figure]:
    """Shares and correlation; empty where fewer than two rewards were logged."""
    shares = {
        "conflict": record.series("conflict/share"),
        "both better": record.series("conflict/both_positive"),
        "both worse": record.series("conflict/both_negative"),
    }
    window = max(1, len(record.rows) // 12)
    found = []
    if np.isfinite(shares["conflict"]).any():
        figure = page.plots.conflict_shares(record.iterations, shares, window=window)
        found.append(
            page.embed_plot(figure, record.folder, "conflict-shares", title="Do the rewards agree on a sample?")
        )
    values = record.series("conflict/correlation")
    if np.isfinite(values).any():
        figure = page.plots.correlation(record.iterations, values, window=window)
        found.append(page.embed_plot(figure, record.folder, "conflict-correlation", title="Correlation of the rewards"))
    return found


def update_plots(record: RunRecord) -> list[page.Figure]:
    """A small curve for every diagnostic that moved."""
    found = []
    for vital in VITALS:
        values = record.series(vital.key)
        if not _moves(values):
            continue
        figure = page.plots.vital_sign(record.iterations, values, band=vital.band, logarithmic=vital.logarithmic)
        name = f"update-{vital.key.split('/')[1]}"
        found.append(page.embed_plot(figure, record.folder, name, title=vital.title, caption=_hint(vital)))
    return found


def _hint(vital: Vital) -> str:
    """What to look for, and the healthy band."""
    if vital.band is None:
        return vital.hint
    low, high = vital.band
    return f"{vital.hint}; healthy {f'from {number(low)} to' if np.isfinite(low) else 'up to'} {number(high)} (green)"


def constant_vitals(record: RunRecord) -> list[tuple[str, float]]:
    """(title, value) of every diagnostic that kept one value."""
    series = ((vital.title, record.series(vital.key)) for vital in VITALS)
    return [(title, float(v[np.isfinite(v)][0])) for title, v in series if np.isfinite(v).any() and not _moves(v)]


def stages(record: RunRecord) -> list[Stage]:
    """Seconds by stage over the whole run; what happened outside the iterations is the last row."""
    logged = {key.removeprefix("seconds/") for row in record.rows for key in row if key.startswith("seconds/")}
    names = [*(s for s in STAGES if s in logged), *sorted(logged.difference(STAGES))]
    totals = {name: float(np.nansum(record.series(f"seconds/{name}"))) for name in names}
    inside = sum(totals.values())
    outside = float(record.info.get("seconds") or 0.0) - inside
    if totals and outside > 0.01 * inside:
        totals["outside iterations"] = outside
    whole = sum(totals.values()) or np.nan
    return [
        Stage(name, total, total / len(record.rows) if name in logged else np.nan, total / whole)
        for name, total in totals.items()
    ]


def sample_grid(record: RunRecord, problems: list[str]) -> list[page.Block]:
    """The grid over training, folded away; the last grid of a run that was stopped before it. Damage is named."""
    folder = record.folder / "samples"
    prompts = [p.read_text(encoding="utf-8", errors="replace") for p in sorted(folder.glob("cells/*-prompt.txt"))]
    rows = f". The rows: {'; '.join(prompts)}." if prompts else ""
    found = [(path, f"Iteration {iteration}") for iteration, path in iteration_files(folder, ".png")][-1:]
    if (path := folder / "over_training.png").is_file():
        found = [(path, "Reference, then the same prompt and noise over training")]
    for path, title in found:
        try:
            figure = page.embed(path, base=record.folder, alt=title + rows)
            return [page.Details(f"{title} (a row is one task)", [page.Figures([figure], "wide")])]
        except (OSError, SyntaxError):
            problems.append(f"samples/{path.name} could not be read as an image.")
    return []


def facts(record: RunRecord) -> list[tuple[str, Any]]:
    """The run in a few lines."""
    summary = record.summary
    trainable, total = summary.get("trainable_parameters"), summary.get("total_parameters")
    share = f" of {count(total)}" if total else ""
    samples, best = summary.get("samples_per_iteration"), record.info.get("best_checkpoint")
    gain = f"iteration {best['iteration']}, worst-reward gain {number(best['worst_reward_gain'])}" if best else None
    seconds = sum(stage.total for stage in stages(record))
    return [
        ("model", summary.get("model")),
        ("trained parameters", f"{count(trainable)}{share}" if trainable else None),
        ("rewards", ", ".join(record.rewards)),
        ("samples per iteration", None if samples is None else count(samples)),
        ("iterations", progress(record)),
        ("best checkpoint", gain),
        ("time", duration(seconds) if seconds else None),
    ]


def _colours(metrics: Sequence[str]) -> list[str]:
    return [page.plots.SERIES[i % len(page.plots.SERIES)] for i in range(len(metrics))]


def _moves(values: np.ndarray) -> bool:
    finite = values[np.isfinite(values)]
    return len(finite) > 0 and bool((finite != finite[0]).any())
