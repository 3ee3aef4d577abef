"""Measure weights, and runs that began with them, against acceptance.yaml.

    python -m tools.pretrain.acceptance WEIGHTS [RUN ...]

WEIGHTS is a folder of `make pretrain`; the runs are those of the seeds in the file. It exits with 1 if a line fails.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from customized_grpo.assemble import build_rewards, open_policy
from customized_grpo.functional import advantages, statistics
from customized_grpo.store.run import RunFolder
from customized_grpo.store.scores import Scores, change
from customized_grpo.store.yaml_text import parse_yaml
from customized_grpo.toyworld import WEIGHTS_VARIABLE
from customized_grpo.toyworld.dataset import ToyExample, ToyWorld
from customized_grpo.toyworld.oracle import Oracle
from customized_grpo.toyworld.world import ATTRIBUTES
from customized_grpo.train.evaluation import evaluate
from tools.labelled import COUNT, answers, labelled, precision_and_recall
from tools.pretrain.clip import SWAPS

FILE = Path(__file__).with_name("acceptance.yaml")
GROUP = 8
"""Images of a group, of which the base shows how often one is fully right."""
Wanted = dict[str, Any]


class Line(NamedTuple):
    """One thing that was asked for."""

    name: str
    found: float
    low: float = -np.inf
    high: float = np.inf

    @property
    def verdict(self) -> str:
        if np.isinf(self.low) and np.isinf(self.high):
            return "printed"
        return "unknown" if np.isnan(self.found) else "pass" if self.low <= self.found <= self.high else "FAIL"

    def __str__(self) -> str:
        bounds = [f"{sign} {bound:g}" for sign, bound in ((">=", self.low), ("<=", self.high)) if np.isfinite(bound)]
        return f"{self.verdict:<8}{self.name:<52}{self.found:>9.3f}   {', '.join(bounds)}"


def accept(weights: Path, runs: Sequence[Path], wanted: Wanted, pictures: int = COUNT) -> Iterator[Line]:
    """Every line of the file, as it is measured; of the oracle on this many pictures of each attribute."""
    os.environ[WEIGHTS_VARIABLE] = str(weights)
    yield from of_components(weights, wanted["components"])
    yield from of_oracle(Oracle.load(weights / "oracle"), wanted["components"]["oracle"], pictures)
    base = measure(None, wanted["tasks"], GROUP)
    yield from of_base(base, wanted["base"])
    noises = wanted["tasks"]["noises"]
    tuned = {path.name: measure(path, wanted["tasks"], noises) for path in runs}
    if tuned:
        yield from (
            Line(f"minutes, {p.name}", minutes(p), high=wanted["training"]["minutes_on_two_cores"]) for p in runs
        )
        yield from of_training(replace(base, values=base.values[:noises]), tuned, wanted["training"])


def of_components(weights: Path, wanted: Wanted) -> Iterator[Line]:
    """What the report of `make pretrain` has measured, and sizes."""
    file = weights / "figures.json"
    figures = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    of_autoencoder, of_clip = figures.get("autoencoder", {}), figures.get("clip", {})
    asked = wanted["autoencoder"]
    yield Line("autoencoder, dB", of_autoencoder.get("PSNR mean, dB", np.nan), asked["psnr_db"])
    yield Line(
        "- on the subject, dB", of_autoencoder.get("PSNR on the subject, dB", np.nan), asked["psnr_on_subject_db"]
    )
    seconds = of_autoencoder.get("seconds to decode 64 images", np.nan)
    yield Line("- seconds to decode 64 images", seconds, high=asked["seconds_to_decode_64_images_on_one_thread"])
    for swap in SWAPS:
        yield Line(f"clip, swap {swap}", of_clip.get(f"swap {swap}", np.nan), wanted["clip"]["lowest_word_swap"])
    second = sum((weights / name).is_dir() for name in ("clip_2", "dino_2"))
    yield Line("second encoders", second, 2 * wanted["second_encoders"]["one_more_for_each_reward"])
    size = sum(file.stat().st_size for file in weights.rglob("*.safetensors")) / 1e6
    yield Line("weights, MB", size, high=wanted["size"]["weights_mb"])


def of_oracle(oracle: Oracle, wanted: Wanted, count: int) -> Iterator[Line]:
    """On the constructed pictures that are never used for mending; generated ones need labels by eye."""
    for attribute in ATTRIBUTES:
        items = [item for item in labelled(attribute, count, oracle.size) if not item.for_mending]
        precision, recall = precision_and_recall(items, answers(oracle, items))
        yield Line(f"oracle, precision of {attribute}", precision, wanted["precision"])
        yield Line(f"oracle, recall of {attribute}", recall, wanted["recall"])


def measure(run: Path | None, wanted: Wanted, noises: int) -> Scores:
    """The scores of the base policy, or of a run's last checkpoint, on the tasks of the file."""
    source = open_policy(None, run=run)
    config, policy = source.config, source.build()
    rewards, metrics = build_rewards(config.rewards), build_rewards(config.metrics, "metric")
    settings = config.evaluation.model_copy(update={"replicates": noises, "seed": wanted["dataset_seed"]})
    side = int(policy.resolution)  # pyright: ignore[reportAttributeAccessIssue]
    steps = config.evaluation_steps
    return evaluate(policy, tasks(wanted, side), rewards, metrics, settings, steps, int(run is not None)).scores


def tasks(wanted: Wanted, size: int) -> list[ToyExample]:
    """As many of each kind; a creature has one task of each."""
    split, count, seed = wanted["split"], wanted["per_kind"], wanted["dataset_seed"]
    worlds = {kind: ToyWorld(split, count, seed, kinds=(kind,), size=size) for kind in wanted["kinds"]}
    return [replace(task, id=f"{task.id}-{kind}") for kind, world in worlds.items() for task in world]


def of_base(scores: Scores, wanted: Wanted) -> Iterator[Line]:
    """What is shown by kind, and what a group has to choose from."""
    for kind in scores.distinct_kinds():
        shown = np.nanmean(scores.of_kind(kind).complete("oracle_prompt"))
        yield Line(f"base, all shown, {kind}", float(shown), *wanted["shown_by_kind"])
    right = scores.column("oracle_right") == 1
    yield Line("base, fully right", float(right.mean()))
    yield Line(f"base, groups of {len(right)} with one fully right", float(right.any(0).mean()))
    rewards = torch.from_numpy(np.stack([scores.column(name) for name in scores.rewards], -1)).movedim(0, 1)
    conflict = advantages.conflict_statistics(advantages.standardize(rewards)).conflict
    yield Line("base, conflict share", float(conflict), *wanted["conflict_share"])
    spreads = advantages.group_variance(rewards).sqrt().nanmean(0).tolist()
    yield from (Line(f"base, spread of {r} in a group", s) for r, s in zip(scores.rewards, spreads, strict=True))


def of_training(base: Scores, tuned: dict[str, Scores], wanted: Wanted) -> Iterator[Line]:
    """What each run gained, and the kinds of all runs together."""
    for run, scores in tuned.items():
        for reward in ("prompt", "identity"):
            gain = change(base, scores, reward).difference.value
            yield Line(f"gain in {reward}, {run}", gain, wanted[f"{reward}_gain_every_seed"])
    points = [100 * change(base, scores, "oracle_right").difference.value for scores in tuned.values()]
    yield Line("gain in fully right, points", float(np.mean(points)), wanted["fully_right_gain_points"])
    for kind in base.distinct_kinds():
        before = base.of_kind(kind)
        per_task = [part.of_kind(kind).per_task("oracle_right") for part in tuned.values()]
        gains = torch.from_numpy(np.stack(per_task) - before.per_task("oracle_right"))  # (runs, tasks)
        upper = statistics.mean_interval(gains.mean(0)[None], before.subjects, torch.Generator().manual_seed(0)).high
        yield Line(f"{kind}, upper bound of the change, points", 100 * float(upper), 0.0)
        lowest = 100 * float(gains.mean(1).min())
        yield Line(f"{kind}, lowest of any run, points", lowest, wanted["lowest_kind_of_any_seed_points"])


def minutes(run: Path) -> float:
    """From the start of a run to its end, with its report; NaN if it has not ended."""
    facts = RunFolder.existing(run).facts()
    if not facts.get("finished"):
        return np.nan
    begun, ended = (datetime.fromisoformat(facts[name]) for name in ("started", "finished"))
    return (ended - begun).total_seconds() / 60


def main() -> None:
    weights, *runs = map(Path, sys.argv[1:])
    failed = False
    for line in accept(weights.resolve(), runs, parse_yaml(FILE.read_text(encoding="utf-8"), f"'{FILE}'")):
        print(line, flush=True)
        failed |= line.verdict == "FAIL"
    sys.exit(failed)


if __name__ == "__main__":
    main()
