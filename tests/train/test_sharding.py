"""Sharded over two processes against one process with everything: the same weights, and half of them on each."""

import json
from pathlib import Path
from types import SimpleNamespace

import invariants
import pytest
import torch
from diffusers import FluxTransformer2DModel

import fakes
from customized_grpo.distributed import refuse_other_sharding
from customized_grpo.errors import UserError
from customized_grpo.store.run import RunFolder
from customized_grpo.train.checkpoint import checkpoints, load
from customized_grpo.train.sharding import shard
from test_distributed import start

from . import sharded

pytestmark = pytest.mark.timeout(600)  # the first test trains all cases
SCRIPT = """
import sys
from pathlib import Path
from train.sharded import main

main(Path(sys.argv[1]))
"""

FAILING = """
import os, signal, sys, time
from pathlib import Path
import fakes, torch
from customized_grpo.errors import TrainingError, UserError
from customized_grpo.settings.parse import parse_config
from customized_grpo.train.settings import TrainerConfig
from customized_grpo.train.trainer import Trainer

torch.set_num_threads(1)
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])

class Policy(fakes.LinearPolicy):
    def encode(self, examples):
        if when == "encoding" and rank == 1 and trainer.iteration == 1:
            raise UserError("The picture is gone; put it back.")
        return super().encode(examples)

    def velocity(self, latents, sigma, conditioning):
        if when == "killed" and rank == 1 and trainer.iteration == 1:
            (folder / "when.txt").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().velocity(latents, sigma, conditioning)

for when in ("encoding", "killed"):
    config = parse_config({
        "output": str(folder / when), "rollout": {"num_generations": 4, "num_inference_steps": 5},
        "training": {"iterations": 3, "prompts_per_iteration": 4, "updates_per_epoch": 1, "sharding": "fsdp2"},
        "tracking": {"log_with": []}, "checkpoint": {"every": 1},
    }, TrainerConfig)
    rewards = {"prompt": fakes.red, "identity": fakes.dark}
    trainer = Trainer(Policy(), rewards, fakes.examples(), None, config)
    try:
        trainer.train()
    except (UserError, TrainingError) as error:
        took = time.time() - float((folder / "when.txt").read_text()) if when == "killed" else 0
        (folder / f"{when}{rank}.txt").write_text(f"{error} {'late' if took > 30 else ''}")
os._exit(0)  # see customized_grpo.cli.terminal.leave_at_once
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, trained by one process and by two."""
    folder = tmp_path_factory.mktemp("sharding")
    for processes, name in enumerate(("one", "two"), start=1):
        start(SCRIPT, folder / name, processes, "")
    return folder


def drift(folder: Path, case: str, iteration: int) -> float:
    """How far two processes are from one, of the step that training made."""
    start = sharded.make(case, folder / "start", 1).policy.trainable_state()
    one, two = (invariants.weights(folder / name / case, iteration) for name in ("one", "two"))
    return invariants.difference(two, one, start)


@pytest.mark.parametrize("case", sharded.CASES)
def test_two_processes_train_what_one_does(folder: Path, case: str) -> None:
    assert drift(folder, case, 1) <= (0.2 if case == "awm" else 2e-3)


@pytest.mark.parametrize("case", sharded.CASES)
def test_each_process_holds_its_part_of_the_trained_weights(folder: Path, case: str) -> None:
    for rank in range(2):
        assert json.loads((folder / "two" / f"shares{rank}.json").read_text())[case] <= 1.1 / 2


def test_evaluations_and_metrics_are_those_of_one_process(folder: Path) -> None:
    one, two = (RunFolder(folder / name / "full") for name in ("one", "two"))
    for iteration in (0, 1):
        torch.testing.assert_close(*(read(run, iteration) for run in (one, two)), rtol=1e-4, atol=1e-5)
    assert (two.samples / "iteration-000001.png").is_file()
    for alone, together in zip(one.records(), two.records(), strict=True):
        assert alone.keys() == together.keys()
        for key, value in alone.items():
            if not key.startswith(("seconds/", "memory/")):
                assert together[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


def read(run: RunFolder, iteration: int) -> torch.Tensor:
    return torch.tensor(json.loads(run.evaluation(iteration).read_text())["values"])


def test_a_run_goes_on_with_another_number_of_processes(folder: Path) -> None:
    """Two have gone on with the run of one; now one goes on with that of two. `resume` compares every bit loaded."""
    sharded.resume(RunFolder(folder / "two" / "nft"), processes=1)
    assert drift(folder, "nft", 2) <= 2e-3


def test_a_checkpoint_holds_a_model_to_load(folder: Path) -> None:
    (last,) = checkpoints(folder / "two" / "full" / "checkpoints")
    model = FluxTransformer2DModel.from_pretrained(last / "adapter" / "transformer")
    averaged = load(last).ema
    assert averaged is not None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, averaged[name])


def test_a_process_that_fails_or_is_killed_ends_the_others_and_the_last_checkpoint_is_good(tmp_path: Path) -> None:
    start(FAILING, tmp_path / "run", 2, "", expect=1)
    said = {path.stem: path.read_text() for path in (tmp_path / "run").glob("*[01].txt")}
    assert said.keys() == {"encoding0", "encoding1", "killed0"}
    assert said["encoding0"] == said["encoding1"] == "Process 1: The picture is gone; put it back. "
    assert said["killed0"].startswith("Another process of this run is gone")
    assert not said["killed0"].endswith("late")
    for when in ("encoding", "killed"):
        (last,) = checkpoints(tmp_path / "run" / when / "checkpoints")
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
