"""Training groups with all their images, rewards and advantages, which show what the update prefers."""

import json
from pathlib import Path
from typing import Any

from customized_grpo import page
from customized_grpo.page.formats import DASH, MINUS, words
from customized_grpo.store.run import RunRecord, iteration_files


def group_blocks(record: RunRecord, problems: list[str]) -> list[page.Block]:
    """The groups of the first and of the last iteration that kept them, the preferred image first."""
    folder = record.folder / "samples" / "groups"
    rows: list[page.Shown] = []
    found = list(iteration_files(folder, ".json"))
    for iteration, path in [*found[:1], *found[1:][-1:]]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            for group in content["groups"]:
                images = sorted(group["images"], key=_preference, reverse=True)
                files = [(folder / Path(image["file"]).name, _marks(image, content["rewards"])) for image in images]
                for file, _ in files:
                    page.thumbnail(file, 8)  # whether it can be read
                told = ", ".join(filter(None, [f"iteration {iteration}", group["kind"]]))
                rows.append(page.Shown(group["prompt"], told, files))
        except (OSError, SyntaxError, ValueError, KeyError, TypeError):
            problems.append(f"samples/groups/{path.name} or one of its images could not be read.")
    if not rows:
        return [page.Text("No training groups have been kept.", "soft")]
    explained = (
        "Each row is all that was sampled for one prompt of a training iteration, the preferred image first. The "
        "update makes images with a positive advantage (▲) more likely and those with a negative one (▼) less; two "
        "numbers are those of the first and the last trained step. z: how many standard deviations a reward is above "
        "the mean of its group. Sampling in training adds noise, so these images are worse than evaluated ones."
    )
    headers = [str(n + 1) for n in range(max(len(row.files) for row in rows))]
    return [page.Text(explained), page.image_grid(headers, rows, record.folder, "groups")]


def _preference(image: dict[str, Any]) -> float:
    """The mean advantage over the trained steps."""
    return sum(image["advantages"]) / len(image["advantages"])


def _marks(image: dict[str, Any], rewards: list[str]) -> list[str]:
    """The advantage, and each reward with its z."""
    first, last = (_short(image["advantages"][n], "+") for n in (0, -1))
    told = first if first == last else f"{first} → {last}"
    columns = zip(rewards, image["rewards"], image["z"], strict=True)
    scores = [f"{words(name)} {_short(value)} (z {_short(z, '+')})" for name, value, z in columns]
    return [f"{'▲' if _preference(image) > 0 else '▼'} {told}", *scores]


def _short(value: float | None, sign: str = "") -> str:
    """Two digits after the point; a dash where a reward could not score."""
    return DASH if value is None else f"{value:{sign}.2f}".replace("-", MINUS)
