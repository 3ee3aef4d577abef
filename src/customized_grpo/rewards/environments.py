"""Environments for rewards whose packages do not go together with this one's: what is installed, and how to use it."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from customized_grpo.errors import UserError, nearest


@dataclass(frozen=True)
class Environment:
    """What a reward needs, and what to know before it is installed."""

    requirements: tuple[str, ...]
    licence: str
    weights: str
    """What is downloaded when it first runs, and its size."""
    memory: str
    """Of a GPU."""
    use: str
    """How it is started or named in a configuration; {folder} is where it was installed."""
    python: str = "3.11"
    repository: tuple[str, str] | None = None
    """Address and commit of code without a package. Its folder is put on the environment's import path."""


_VLLM = "vLLM takes 90 % of the GPU unless told otherwise"


def _memory(billions: float) -> str:
    return f"{2 * billions:.0f} GB for {billions} billion weights in bfloat16"


def _judge(licence: str, weights: str, memory: str, rubric: str, model: str, *more: str) -> Environment:
    use = f"{{folder}}/bin/vllm serve {model} --served-model-name {rubric}\n"
    use += f"rewards.edit={{{{use: VlmJudge, rubric: {rubric}, model: {rubric}}}}}"
    return Environment(("vllm==0.11.0", *more), licence, weights, memory, use)


def _remote(reward: str) -> str:
    return f"rewards.NAME={{{{use: RemoteReward, reward: {{{{{reward}}}}}, python: {{folder}}/bin/python}}}}"


ENVIRONMENTS = {
    "hpsv3": Environment(
        ("hpsv3==1.0.0", "numpy", "pillow"),
        "not stated by the package; see github.com/MizzenAI/HPSv3",
        "MizzenAI/HPSv3 on Qwen2-VL-7B-Instruct, about 17 GB each",
        f"{_memory(8.3)}, and activations",
        _remote("use: Hpsv3Reward"),
    ),
    "editreward": Environment(
        (
            "torch==2.5.1", "torchvision==0.20.1", "transformers==4.57.0", "trl==0.8.6", "peft==0.17.1",
            "accelerate==1.10.1", "datasets==3.6.0", "fire==0.7.1", "omegaconf==2.3.0", "matplotlib==3.10.8",
            "tensorboard==2.20.0", "pandas==2.3.3", "requests", "numpy", "pillow",
        ),
        "code MIT",
        "EditReward and its base model MiMo-VL-7B-SFT-2508, about 17 GB each",
        f"{_memory(8.3)}, and activations",
        _remote("use: EditReward, checkpoint: PATH"),
        repository=("https://github.com/TIGER-AI-Lab/EditReward", "edb027edde6080b8a9521ef8e87049b3797f8374"),
    ),
    "editscore": _judge(
        "code Apache 2.0",
        "Qwen3-VL-8B-Instruct, about 18 GB, and EditScore's LoRA; merge them first",
        f"{_memory(8.8)}; {_VLLM}",
        "editscore",
        "MERGED_FOLDER",
        "editscore==0.2",
    ),
    "unifiedreward-edit": _judge(
        "code MIT",
        "CodeGoat24/UnifiedReward-Edit-qwen3vl-8b, about 18 GB",
        f"{_memory(8.8)}; {_VLLM}",
        "unifiedreward-edit",
        "CodeGoat24/UnifiedReward-Edit-qwen3vl-8b",
    ),
    "paco-reward": _judge(
        "weights Apache 2.0; the code has no licence file",
        "X-GenGroup/PaCo-Reward-7B, about 17 GB",
        f"{_memory(8.3)}; {_VLLM}",
        "paco-reward",
        "X-GenGroup/PaCo-Reward-7B",
    ),
}  # fmt: skip
"""By the name that `cgrpo rewards install` takes. Memory is computed from the number of parameters, not measured."""


def commands(environment: Environment, folder: Path) -> list[list[str]]:
    """What makes the environment in `folder`, in order: by uv where it is installed, else by venv and pip.

    Raises:
        UserError: if there is no Python of its version, or no pip.
    """
    python, uv = folder / "bin" / "python", shutil.which("uv")
    if uv is not None:
        made = [uv, "venv", "--python", environment.python, str(folder)]
        install = [uv, "pip", "install", "--python", str(python)]
    else:
        made = [_interpreter(environment.python), "-m", "venv", "--without-pip", str(folder)]
        install = [sys.executable, "-m", "pip", "--python", str(python), "install"]
    steps = [made, [*install, *environment.requirements]]
    if environment.repository is not None:
        address, commit = environment.repository
        source = str(folder / "source")
        steps += [["git", "clone", "--quiet", "--no-checkout", address, source]]
        steps += [["git", "-C", source, "checkout", "--quiet", commit]]
    return steps


def _interpreter(version: str) -> str:
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        return sys.executable
    if found := shutil.which(f"python{version}"):
        return found
    raise UserError(
        f"This environment needs Python {version}, and neither uv nor python{version} was found; install one."
    )


def environment_named(name: str) -> Environment:
    """The environment of that name.

    Raises:
        UserError: if there is none.
    """
    if name not in ENVIRONMENTS:
        known = ", ".join(ENVIRONMENTS)
        raise UserError(f"There is no environment for '{name}', only for {known}.{nearest(name, ENVIRONMENTS)}")
    return ENVIRONMENTS[name]


def install(environment: Environment, folder: Path) -> None:
    """Make an environment. A folder that could not be finished is removed.

    Raises:
        UserError: if the folder exists, or with the command that failed.
    """
    if folder.exists():
        raise UserError(f"The folder {folder} exists already; remove it or choose another with --folder.")
    steps = commands(environment, folder)
    try:
        for step in steps:
            _run(step)
        if environment.repository is not None:
            packages = next(folder.glob("lib/python*/site-packages"))
            (packages / "source.pth").write_text(f"{folder / 'source'}\n")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, check=False)
    except OSError as error:
        raise UserError(f"`{command[0]}` could not be started ({error}); install it, then try again.") from error
    if done.returncode:
        raise UserError(f"`{' '.join(command)}` failed with status {done.returncode}; its messages are above.")
