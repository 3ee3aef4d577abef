"""Two processes against one, with the real launcher: the same weights, and ranks that agree bit for bit."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

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


def launch(folder: Path, processes: int, advantage: str) -> list[dict[str, torch.Tensor]]:
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(folder), advantage]
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
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    (alone,) = launch(tmp_path / "one", 1, "gdpo")
    first, second = launch(tmp_path / "two", 2, "gdpo")
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=1e-5)
    runs = [(tmp_path / n / "run" / "evaluations" / "iteration-000003.json").is_file() for n in ("one", "two")]
    assert runs == [True, True]
