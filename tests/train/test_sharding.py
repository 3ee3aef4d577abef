"""Sharded over two and three processes against one with everything: the same weights, and a part of them on each."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import invariants
import numpy as np
import pytest
import torch
import yaml
from diffusers import FluxTransformer2DModel
from PIL import Image

import fakes
from customized_grpo.distributed import refuse_other_sharding
from customized_grpo.errors import UserError
from customized_grpo.store.run import RunFolder
from customized_grpo.train.checkpoint import checkpoints, load
from customized_grpo.train.sharding import shard
from policies import tiny
from policies.runs import from_the_command_line

from . import sharded

pytestmark = pytest.mark.timeout(900)  # the first test trains all cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, trained by one process and by two; and the run of nft from one process to two and to three."""
    folder = tmp_path_factory.mktemp("sharding")
    sharded.train_all(folder / "one", processes=1, iterations=4)
    later = shutil.ignore_patterns("iteration-00000[2-4]*")
    shutil.copytree(folder / "one" / "nft", folder / "chain" / "nft", ignore=later)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "train.sharded", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def drift(folder: Path, run: str, case: str, iteration: int = 1) -> float:
    """How far a run is from that of one process, of the step that training made."""
    start = sharded.make(case, folder / "start", 1).policy.trainable_state()
    found, plain = (invariants.weights(folder / name / case, iteration) for name in (run, "one"))
    return invariants.difference(found, plain, start)


@pytest.mark.parametrize("case", sharded.CASES)
def test_two_processes_train_what_one_does(folder: Path, case: str) -> None:
    assert drift(folder, "two", case) <= (0.2 if case == "awm" else 2e-3)


@pytest.mark.parametrize("processes", [2, 3])
def test_each_process_holds_its_part_of_the_trained_weights(folder: Path, processes: int) -> None:
    for rank in range(processes):
        shares = json.loads((folder / f"shares{rank}-of-{processes}.json").read_text())
        assert max(shares.values()) <= 1.1 / processes


def test_evaluations_and_metrics_are_those_of_one_process(folder: Path) -> None:
    one, two = (RunFolder(folder / name / "full") for name in ("one", "two"))
    for iteration in (0, 1):
        torch.testing.assert_close(*(read(run.evaluation(iteration)) for run in (one, two)), rtol=1e-4, atol=1e-5)
    assert (two.samples / "iteration-000001.png").is_file()
    for alone, together in zip(one.records(), two.records(), strict=True):
        assert alone.keys() == together.keys()
        for key, value in alone.items():
            if not key.startswith(("seconds/", "memory/")):
                assert together[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


def read(scores: Path) -> torch.Tensor:
    return torch.tensor(json.loads(scores.read_text())["values"])


def test_a_run_goes_on_with_another_number_of_processes(folder: Path) -> None:
    """One, two, three and again one, without sharding at both ends. `resume` compares every bit loaded."""
    sharded.resume(RunFolder(folder / "chain" / "nft"), processes=1, iterations=4)
    for iteration in (2, 3, 4):
        assert 0 < drift(folder, "chain", "nft", iteration) <= 1e-3


def test_eval_and_generate_use_the_weights_of_a_sharded_run_on_one_process(folder: Path) -> None:
    tiny.kontext_pipeline().save_pretrained(folder / "pipeline")
    sharded.EXAMPLES[0].references[0].save(folder / "hat.png")
    one, two = (RunFolder(folder / name / "full") for name in ("one", "two"))
    data = {"use": "train.sharded:Dataset"}
    for run in (one, two):
        tree = {
            **yaml.safe_load(run.config.read_text()), "data": {"train": data, "eval": data},
            "policy": {"use": "FluxKontextPolicy", "trainable": "full", "path": str(folder / "pipeline")},
            "rewards": {"prompt": {"use": "fakes:red"}, "identity": {"use": "fakes:dark"}}, "metrics": {},
        }  # fmt: skip
        run.config.write_text(yaml.safe_dump(tree, sort_keys=False))
        words = ["--reference", folder / "hat.png", "--prompt", "a hat", "--output", run.path / "sheet.png"]
        from_the_command_line("generate", "--run", run.path, *words, "--trust-code")
    from_the_command_line("eval", "--run", two.path, "--output", folder / "scores", "--trust-code")
    alone, together = (np.asarray(Image.open(run.path / "sheet.png"), dtype=int) for run in (one, two))
    assert abs(alone - together).max() <= 2
    found, base = (read(folder / "scores" / f"iteration-00000{iteration}.json") for iteration in (1, 0))
    torch.testing.assert_close(found, read(two.evaluation(1)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, base, atol=1e-3)


def test_a_checkpoint_holds_a_model_to_load(folder: Path) -> None:
    (last,) = checkpoints(folder / "two" / "full" / "checkpoints")
    model = FluxTransformer2DModel.from_pretrained(last / "adapter" / "transformer")
    averaged = load(last).ema
    assert averaged is not None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, averaged[name])


def test_a_process_that_fails_or_is_killed_ends_the_others_and_the_last_checkpoint_is_good(folder: Path) -> None:
    said = {path.stem: path.read_text() for path in folder.glob("*[012].txt")}
    assert said.keys() == {"encoding0", "encoding1", "killed0", "killed1"}
    assert said["encoding0"] == said["encoding1"] == "Process 1: The picture is gone; put it back."
    for rank in range(2):
        assert said[f"killed{rank}"].startswith("Another process of this run is gone")
        assert not said[f"killed{rank}"].endswith("late")
    for when in ("encoding", "killed"):
        (last,) = checkpoints(folder / when / "checkpoints")
        assert load(last).iteration == 1


@pytest.mark.parametrize(
    ("offload", "dtype", "sentence"), [("swap", torch.float32, "offload"), ("none", torch.int8, "quant")]
)
def test_what_cannot_be_sharded_is_refused(offload: str, dtype: torch.dtype, sentence: str) -> None:
    policy = fakes.LinearPolicy()
    vars(policy)["offload"] = offload
    policy.module.frozen = torch.nn.Parameter(torch.zeros(2, dtype=dtype), requires_grad=False)
    with pytest.raises(UserError, match=f"training.sharding is fsdp2, .*set policy.{sentence}"):
        shard(policy, "fsdp2", SimpleNamespace(num_processes=1))


@pytest.mark.parametrize("flag", ["fsdp", "deepspeed"])
def test_another_way_to_shard_is_refused(flag: str) -> None:
    with pytest.raises(UserError, match=f"--use_{flag}.* set training.sharding=fsdp2"):
        refuse_other_sharding({f"ACCELERATE_USE_{flag.upper()}": "true"})
    refuse_other_sharding({f"ACCELERATE_USE_{flag.upper()}": "false"})
