"""Comparisons with known answers, written to disk as `cgrpo compare` would, without training."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from customized_grpo.settings.parse import parse_config, to_yaml
from customized_grpo.store import write
from customized_grpo.studies.compare.cells import open_folder
from customized_grpo.studies.compare.grid import Cell, Grid
from studies.compare.tiny import CONFIG

METRICS = ("prompt", "identity", "oracle_prompt", "oracle_subject")
REWARDS = METRICS[:2]
BASE_LEVELS = (0.5, 0.7, 0.4, 0.5)
ITERATIONS = (2, 4)

Gains = Mapping[str, tuple[float, ...]]
"""Method to the gain in each metric at the end."""


def make_grid(gains: Gains, seeds=(0, 1, 2), **more) -> Grid:
    return parse_config({"config": CONFIG, "methods": list(gains), "seeds": list(seeds), **more}, Grid)


def fabricate(root: Path, gains: Gains, *, seeds=(0, 1, 2), tasks: int = 24, noise: float = 0.02, **more) -> Grid:
    """A whole comparison whose gains are known up to noise; every two tasks share a subject."""
    grid = make_grid(gains, seeds, **more)
    base_policy, *made = open_folder(grid, root)
    random = np.random.default_rng(0)
    base = np.array(BASE_LEVELS) + random.normal(0, 0.1, (2, tasks, 4))
    write_evaluation(base_policy.evaluation, 0, base)
    write(base_policy.run.config, to_yaml(base_policy.config))
    write_pictures(root / "base" / "cells", 0)
    for cell in made:
        write_cell(cell, base, np.array(gains[cell.method]), random, noise)
    return grid


def write_cell(cell: Cell, base: np.ndarray, gain: np.ndarray, random: np.random.Generator, noise: float) -> None:
    cell.run.path.mkdir(parents=True)
    (cell.run.path / "config.yaml").write_text(to_yaml(cell.config))
    info = {
        "status": "finished", "command": ["cgrpo", "train", cell.name], "versions": {"torch": "2.0"},
        "hardware": "1 CPU core", "summary": {"model": "Tiny", "rewards": REWARDS},
    }  # fmt: skip
    (cell.run.path / "run.json").write_text(json.dumps(info))
    rows = [
        {
            "iteration": n, "samples": 8 * n, "conflict/share": 0.55 + 0.02 * (n % 2), "conflict/both_positive": 0.25,
            "conflict/both_negative": 0.19, "conflict/correlation": -0.2, "seconds/rollout": 1.5,
        }
        for n in range(1, 5)
    ]  # fmt: skip
    (cell.run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    luck = random.normal(0, noise, 4)  # of the seed: the same for all tasks
    write_evaluation(cell.run.path / "evaluations" / "iteration-000000.json", 0, base)
    for n in ITERATIONS:
        reached = n / ITERATIONS[-1]
        values = base + reached * (gain + luck) + random.normal(0, noise, base.shape)
        write_evaluation(cell.run.path / "evaluations" / f"iteration-{n:06d}.json", n, values)
    write_pictures(cell.run.path / "samples" / "cells", ITERATIONS[-1])


def write_evaluation(path: Path, iteration: int, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tasks = [{"id": f"t{n}", "subject": f"s{n // 2}", "prompt": f"prompt {n} <b>"} for n in range(values.shape[1])]
    cleaned = [[[None if v != v else float(v) for v in row] for row in replicate] for replicate in values]
    payload = {
        "iteration": iteration, "metrics": METRICS, "rewards": REWARDS, "tasks": tasks, "values": cleaned,
    }  # fmt: skip
    path.write_text(json.dumps(payload))


def write_pictures(folder: Path, iteration: int, count: int = 8) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        Image.new("RGB", (8, 8), (20 * n, 50 + 30 * iteration, 90)).save(
            folder / f"{n:03d}-iteration-{iteration:06d}.png"
        )
        Image.new("RGB", (8, 8), (20 * n, 0, 0)).save(folder / f"{n:03d}-reference.png")
        (folder / f"{n:03d}-prompt.txt").write_text(f"prompt {n} <b>")
