"""Two processes against one, with the real launcher: the same weights, ranks that agree, and that fail together."""

import json
import os
import socket
import subprocess
import sys
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import invariants
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from customized_grpo.distributed import combine, join, warn_of_missing_processes
from customized_grpo.errors import UserError
from customized_grpo.train import checkpoint

SCRIPT = """
import os, sys
from pathlib import Path
import fakes, torch
from customized_grpo.train.settings import TrainerConfig
from customized_grpo.settings.parse import parse_config
from customized_grpo.train.trainer import Trainer

torch.set_num_threads(1)
config = {
    "rollout": {"num_generations": 4, "num_inference_steps": 5},
    "training": {"iterations": 3, "prompts_per_iteration": 4, "updates_per_epoch": 1,
                 "optimizer": {"use": "AdamW", "lr": 1e-3}},
    "evaluation": {"examples": 3, "replicates": 1, "batch": 2},
    "tracking": {"log_with": []},
    "method": {"advantage": sys.argv[2]},
}
OBJECTIVES = {
    "nft": ({"use": "nft", "normalize": "batch", "centre": True}, {}),
    "awm": ({"use": "awm", "old_beta": 1.0}, {"beta": 0.1}),
    "dppo": ({"use": "grpo", "divergence_threshold": 1e-5}, {}),
    "stepwise": ({"use": "grpo"}, {"credit": "stepwise"}),
    "run": ({"use": "grpo"}, {}),
}
for name, (objective, method) in OBJECTIVES.items():
    settings = {"output": f"{sys.argv[1]}/{name}", "objective": objective, "method": {**config["method"], **method}}
    settings = parse_config({**config, **settings}, TrainerConfig)
    policy = fakes.LinearPolicy()
    rewards = {"prompt": fakes.red, "identity": fakes.dark}
    trainer = Trainer(policy, rewards, fakes.examples(), fakes.examples(3), settings)
    if name != "run":  # the processes stay together for another run
        trainer.accelerator.end_training = lambda: None
    trainer.train()
    rank, state = trainer.accelerator.process_index, {**policy.trainable_state()}
    state |= {f"old {name}": tensor for name, tensor in trainer.objective.state().items()}
    torch.save(state, f"{sys.argv[1]}/{name}{rank}.pt")
os._exit(0)  # see customized_grpo.cli.terminal.leave_at_once
"""

FAILING = """
import os, signal, sys
from pathlib import Path
import fakes, torch
from customized_grpo.train.settings import TrainerConfig
from customized_grpo.settings.parse import parse_config
from customized_grpo.errors import TrainingError, UserError
from customized_grpo.rewards.contract import RewardUnavailable
from customized_grpo.train.trainer import Trainer

torch.set_num_threads(1)
folder, when = Path(sys.argv[1]), sys.argv[2]
rank = int(os.environ["RANK"])
calls = 0

def judge(images, examples):
    global calls
    calls += 1
    if rank == 1 and when == "rollout" and calls == 3 or rank == 0 and when == "evaluation" and len(images) == 2:
        raise RewardUnavailable("The judge is gone; mend it.")
    if rank == 1 and when == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return fakes.dark(images, examples)

class Policy(fakes.LinearPolicy):
    def velocity(self, latents, sigma, conditioning):
        drift = 0.1 if rank == 1 and when == "update" and torch.is_grad_enabled() else 0.0
        return super().velocity(latents, sigma, conditioning) + drift

config = parse_config({
    "rollout": {"num_generations": 4, "num_inference_steps": 5, "chunk_prompts": 1},
    "training": {"iterations": 3, "prompts_per_iteration": 4, "updates_per_epoch": 1},
    "evaluation": {"examples": 4 if when == "evaluation" else 0, "replicates": 1, "batch": 2},
    "tracking": {"log_with": []}, "method": {"advantage": "gdpo"},
}, TrainerConfig)
held_out = fakes.examples(4) if when == "evaluation" else None
for when in ("update", "killed") if when == "update" else (when,):
    config = config.model_copy(update={"output": folder / when})
    trainer = Trainer(Policy(), {"prompt": fakes.red, "identity": judge}, fakes.examples(), held_out, config)
    try:
        trainer.train()
    except (UserError, TrainingError) as error:
        (folder / f"{when}{rank}.txt").write_text(f"{error.shared} {error}")
os._exit(0)  # see customized_grpo.cli.terminal.leave_at_once
"""


def start(script: str, folder: Path, processes: int, argument: str, expect: int = 0) -> None:
    folder.mkdir()
    (folder / "script.py").write_text(script)
    command = [sys.executable, str(folder / "script.py"), str(folder), argument]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launcher += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
        command = [sys.executable, *launcher, *command[1:]]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == expect, done.stderr[-3000:]


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """With every objective, rules of credit and clipping too."""
    for processes, name in enumerate(("one", "two"), start=1):
        start(SCRIPT, tmp_path / name, processes, "gdpo")
    for objective, count in (("run", 2), ("dppo", 2), ("stepwise", 2), ("nft", 4), ("awm", 4)):
        files = [tmp_path / name / f"{objective}{rank}.pt" for name, rank in (("one", 0), ("two", 0), ("two", 1))]
        alone, first, second = (torch.load(file, weights_only=True) for file in files)
        assert len(alone) == count
        for name, tensor in alone.items():
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name], tensor, rtol=0, atol=1e-5)
    runs = [(tmp_path / n / "run" / "evaluations" / "iteration-000003.json").is_file() for n in ("one", "two")]
    assert runs == [True, True]
    said = [json.loads((tmp_path / n / "run" / "run.json").read_text())["summary"]["processes"] for n in ("one", "two")]
    assert said == [1, 2]


@pytest.mark.parametrize(("when", "process", "kept"), [("rollout", 1, [1]), ("evaluation", 0, [])])
def test_a_reward_that_dies_on_one_process_stops_all_and_the_finished_iterations_are_kept(
    when: str, process: int, kept: list[int], tmp_path: Path
) -> None:
    start(FAILING, tmp_path / "run", 2, when)
    said = {(tmp_path / "run" / f"{when}{rank}.txt").read_text() for rank in range(2)}
    assert said == {f"True Process {process}: The judge is gone; mend it."}
    saved = checkpoint.checkpoints(tmp_path / "run" / when / "checkpoints")
    assert [checkpoint.load(path).iteration for path in saved] == kept


def test_a_guard_on_one_process_stops_all_and_a_killed_process_ends_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    start(FAILING, folder, 2, "update", expect=1)
    both = {(folder / f"update{rank}.txt").read_text() for rank in range(2)}
    assert len(both) == 1
    assert both.pop().startswith("True Process 1: The first ratio of iteration 1 is off 1 by")
    assert not (folder / "killed1.txt").exists()
    assert (folder / "killed0.txt").read_text().startswith("False Another process of this run is gone")


def test_a_process_that_does_not_come_ends_the_wait_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {**invariants.place(0, 2), "MASTER_PORT": str(invariants.free_ports(1)[0]), "OMP_NUM_THREADS": "1"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    soon = InitProcessGroupKwargs(timeout=timedelta(seconds=1))
    monkeypatch.setattr("customized_grpo.distributed.Accelerator", partial(Accelerator, kwargs_handlers=[soon]))
    AcceleratorState._reset_state(True)
    sentence = r"The 2 processes of this run did not come together \(Timed out .*1/2 clients joined.*; start the same"
    with pytest.raises(UserError, match=sentence):
        join(cpu=True)
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    ("environment", "running", "seen"),
    [
        ({"WORLD_SIZE": "2"}, 1, "WORLD_SIZE asks for 2 processes, but this run has 1"),
        ({"WORLD_SIZE": "2", "SLURM_NTASKS": "8"}, 2, "SLURM_NTASKS asks for 8 processes, but this run has 2"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 1, "OMPI_COMM_WORLD_SIZE asks for 4"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, 1, "`accelerate launch` was asked for several"),
    ],
)
def test_fewer_processes_than_asked_for_are_warned_about(environment: dict[str, str], running: int, seen: str) -> None:
    with pytest.warns(UserWarning, match=seen):
        warn_of_missing_processes(running, environment)


@pytest.mark.parametrize(
    ("environment", "running"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "x", "SLURM_NTASKS": "1"}, 2),
        ({"WORLD_SIZE": "1", "MASTER_ADDR": "x"}, 1),
        ({"SLURM_NTASKS": "1"}, 1),
    ],
)
def test_as_many_processes_as_asked_for_are_not(environment: dict[str, str], running: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_missing_processes(running, environment)


def test_metrics_of_all_processes_are_one_record() -> None:
    everyone = [({"loss": 1.0}, {"peak": 3.0}, {"retries": 1}), ({"loss": 2.0}, {"peak": 2.0}, {"retries": 4})]
    one = SimpleNamespace(num_processes=1)
    assert combine(one, *everyone[0]) == {"loss": 1.0, "peak": 3.0, "retries": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("customized_grpo.distributed.gather_objects", lambda accelerator, mine: everyone)
        assert combine(one, *everyone[0]) == {"loss": 1.5, "peak": 3.0, "retries": 5}
