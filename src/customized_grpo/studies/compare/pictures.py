"""The pictures of a comparison's report: the same tasks and noise drawn by every method, chosen by a rule."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from customized_grpo import page
from customized_grpo.data.images import png
from customized_grpo.page.formats import percent, words
from customized_grpo.store import write
from customized_grpo.studies.compare.analysis import Analysis
from customized_grpo.studies.compare.methods import BASE
from customized_grpo.train.grids import grid as picture_grid


def pictures(analysis: Analysis) -> tuple[page.ImageGrid, str]:
    """The images and the rule they were chosen by: evenly spaced in the ranking of how much the candidate helped."""
    comparison, grid = analysis.comparison, analysis.grid
    wanted = [grid.baseline, "naive_1to1.5", grid.candidate]
    shown = [m for m in dict.fromkeys(wanted) if m in analysis.methods]
    seed = next((s for s in grid.seeds if all(s in comparison.runs[m] for m in shown)), None)
    if not shown or seed is None or not grid.pictures:
        return page.ImageGrid([], []), ""
    folders = {m: comparison.runs[m][seed].folder / "samples" / "cells" for m in shown}
    folders = {BASE: comparison.folder / BASE / "cells", **folders}
    stems = {m: f"iteration-{0 if m == BASE else analysis.iterations[-1]:06d}.png" for m in folders}
    count = len(comparison.base.tasks)
    pictured = [n for n in range(count) if all((folders[m] / f"{n:03d}-{stems[m]}").is_file() for m in folders)]
    order, rule = _ranked(analysis, pictured)
    places = sorted({round(i) for i in np.linspace(0, len(order) - 1, min(grid.pictures, len(order)))}) if order else []
    marks = _marks(analysis, seed)
    headers = ["reference", *(("base" if m == BASE else comparison.title(m)) for m in folders)]
    rows, sheet, captions = [], [], []
    for place in places:
        n = order[place]
        prompt = _text(folders[BASE] / f"{n:03d}-prompt.txt")
        files = [folders[BASE] / f"{n:03d}-reference.png", *(folders[m] / f"{n:03d}-{stems[m]}" for m in folders)]
        cells = [
            page.ImageCell(page.embed(f, base=comparison.folder, alt=prompt).source, f"{header}: {prompt}", marks(m, n))
            for f, m, header in zip(files, [None, *folders], headers, strict=True)
        ]
        rows.append(page.ImageRow(prompt, f"rank {place + 1} of {len(order)}", cells))
        sheet.append([Image.open(f).convert("RGB") for f in files])
        captions.append(prompt)
    if rows:
        write(comparison.folder / "plots" / "pictures.png", png(picture_grid(sheet, headers, captions)))
    file = "plots/pictures.png" if rows else ""
    return page.ImageGrid(headers, rows, file), f"{rule} Images of training seed {seed}, first noise."


def _ranked(analysis: Analysis, pictured: list[int]) -> tuple[list[int], str]:
    """The pictured tasks from where the candidate helped least against the baseline to where it helped most."""
    pair = analysis.references
    if len(pair) < 2 or not analysis.balances:
        return pictured, "The first tasks of the held-out data."
    columns = [analysis.metrics.index(metric) for metric in analysis.balances[0].metrics]
    baseline, candidate = (analysis.values[:, :, analysis.methods.index(m), -1][..., columns] for m in pair)
    helped = ((candidate - baseline) / analysis.spread[columns]).mean(dim=-1).nanmean(dim=0)
    title = analysis.comparison.title
    rule = (
        f"Chosen by rule, not by hand: all pictured tasks are ranked by how much better {title(pair[1])} scores "
        f"than {title(pair[0])} (mean of both rewards, in standard deviations, over seeds), and shown at even steps "
        "from the worst to the best."
    )
    scored = [n for n in pictured if bool(helped[n].isfinite())]
    return sorted(scored, key=lambda n: float(helped[n])), rule


def _marks(analysis: Analysis, seed: int) -> Any:
    """What the untrained twins say of one picture, as words."""
    twins = analysis.balances[1].metrics if len(analysis.balances) > 1 else ()
    comparison = analysis.comparison
    short = [words(reward) for reward in comparison.rewards]

    def marks(method: str | None, task: int) -> tuple[str, ...]:
        if method is None or not twins:
            return ()
        scores = comparison.base
        if method != BASE:
            run = comparison.runs[method][seed]
            scores = next(e for e in run.evaluations if e.iteration == analysis.iterations[-1])
        found = []
        for name, twin in zip(short, twins, strict=True):
            value = float(scores.column(twin)[0, task])
            sign = "✓" if value > 0.995 else "✗" if value < 0.005 else "◐"
            found.append(f"{sign} {name} {percent(value)}" if np.isfinite(value) else f"– {name}")
        return tuple(found)

    return marks


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
