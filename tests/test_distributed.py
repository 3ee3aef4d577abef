"""Two processes against one, with the real launcher: the same weights, ranks that agree, and that fail together."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from customized_grpo import checkpoint

SCRIPT = """
import sys
from pathlib import Path
import fakes, torch, torch.distributed
from customized_grpo.config import TrainerConfig, parse_config
from customized_grpo.trainer import Trainer

torch.set_num_threads(1)
config = parse_config({
    "output": sys.argv[1] + "/run",
    "rollout": {"num_generations": 4, "num_inference_steps": 5},
    "training": {"iterations": 3, "prompts_per_iteration": 4, "updates_per_epoch": 1,
                 "optimizer": {"use": "AdamW", "lr": 1e-3}},
    "evaluation": {"examples": 3, "replicates": 1, "batch": 2},
    "tracking": {"log_with": []},
    "method": {"advantage": sys.argv[2]},
}, TrainerConfig)
policy = fakes.LinearPolicy()
trainer = Trainer(policy, {"prompt": fakes.red, "identity": fakes.dark}, fakes.examples(), fakes.examples(3), config)
trainer.train()
rank = trainer.accelerator.process_index
torch.save(policy.trainable_state(), f"{sys.argv[1]}/rank{rank}.pt")
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""

FAILING = """
import os, sys
from pathlib import Path
import fakes, torch, torch.distributed
from customized_grpo.config import TrainerConfig, parse_config
from customized_grpo.errors import UserError
from customized_grpo.rewards.contract import RewardUnavailable
from customized_grpo.trainer import Trainer

torch.set_num_threads(1)
folder, when = Path(sys.argv[1]), sys.argv[2]
rank = int(os.environ["RANK"])
calls = 0

def judge(images, examples):
    global calls
    calls += 1
    if rank == 1 and when == "rollout" and calls == 3 or rank == 0 and when == "evaluation" and len(images) == 2:
        raise RewardUnavailable("The judge is gone; mend it.")
    return fakes.dark(images, examples)

config = parse_config({
    "output": f"{folder}/run",
    "rollout": {"num_generations": 4, "num_inference_steps": 5, "chunk_prompts": 1},
    "training": {"iterations": 3, "prompts_per_iteration": 4, "updates_per_epoch": 1},
    "evaluation": {"examples": 4 if when == "evaluation" else 0, "replicates": 1, "batch": 2},
    "tracking": {"log_with": []}, "method": {"advantage": "gdpo"},
}, TrainerConfig)
held_out = fakes.examples(4) if when == "evaluation" else None
trainer = Trainer(fakes.LinearPolicy(), {"prompt": fakes.red, "identity": judge}, fakes.examples(), held_out, config)
try:
    trainer.train()
except UserError as error:
    (folder / f"rank{rank}.txt").write_text(f"{error.shared} {error}")
torch.distributed.destroy_process_group()
"""


def start(script: str, folder: Path, processes: int, argument: str) -> None:
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
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def launch(folder: Path, processes: int, advantage: str) -> list[dict[str, torch.Tensor]]:
    start(SCRIPT, folder, processes, advantage)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    (alone,) = launch(tmp_path / "one", 1, "gdpo")
    first, second = launch(tmp_path / "two", 2, "gdpo")
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=1e-5)
    runs = [(tmp_path / n / "run" / "evaluations" / "iteration-000003.json").is_file() for n in ("one", "two")]
    assert runs == [True, True]


@pytest.mark.parametrize(("when", "process", "kept"), [("rollout", 1, [1]), ("evaluation", 0, [])])
def test_a_reward_that_dies_on_one_process_stops_all_and_the_finished_iterations_are_kept(
    when: str, process: int, kept: list[int], tmp_path: Path
) -> None:
    start(FAILING, tmp_path / "run", 2, when)
    said = {(tmp_path / "run" / f"rank{rank}.txt").read_text() for rank in range(2)}
    assert said == {f"True Process {process}: The judge is gone; mend it."}
    saved = checkpoint.checkpoints(tmp_path / "run" / "run" / "checkpoints")
    assert [checkpoint.load(path).iteration for path in saved] == kept
