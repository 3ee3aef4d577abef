"""What a run was expected to need against what it took. `python tests/test_memory.py` measures larger models too."""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fakes
from customized_grpo import policies
from customized_grpo.errors import UserError
from customized_grpo.settings.parse import parse_config
from customized_grpo.train.memory import (
    MemoryEstimate,
    Moments,
    explain_full_device,
    modules,
    optimizer_bytes,
    peak,
    size_of,
)
from customized_grpo.train.preflight import Summary, expected_memory
from customized_grpo.train.settings import TrainerConfig
from customized_grpo.train.trackers import RunFolder
from customized_grpo.train.trainer import Observer, Trainer
from policies import tiny


class Start(Observer):
    def on_start(self, summary: Summary) -> None:
        self.memory = summary.memory


def make(policy: Any, examples: list, folder: Path, **sections: dict[str, Any]) -> Trainer:
    """A run of two iterations of two groups of four."""
    tree = {
        "output": str(folder / "run"),
        "rollout": {"num_generations": 4, "num_inference_steps": 3, "steps": "all_steps"},
        "training": {"iterations": 2, "prompts_per_iteration": 2, "updates_per_epoch": 1},
        "evaluation": {"examples": 0},
        "tracking": {"log_with": []},
    }
    tree = {name: {**tree.get(name, {}), **sections.get(name, {})} for name in {**tree, **sections} if name != "output"}
    config = parse_config({**tree, "output": str(folder / "run")}, TrainerConfig)
    return Trainer(policy, {"prompt": fakes.red, "identity": fakes.dark}, examples, None, config)


def copies(trainer: Trainer) -> list[torch.Tensor]:
    """Of the trained weights: their average, the old policy and the base policy."""
    base = getattr(trainer.policy, "_base", None) or {}
    return [*(trainer.update.ema or {}).values(), *trainer.objective.state().values(), *base.values()]


def expected_and_measured(trainer: Trainer) -> tuple[MemoryEstimate, int]:
    """The estimate without the process's libraries, which no profiler counts, and the peak of the run."""
    start = Start()
    before = size_of(copies(trainer)) if trainer.policy.device.type == "cpu" else 0
    measured = before + measure(trainer.policy, lambda: trainer.train(start))
    return MemoryEstimate({k: v for k, v in start.memory.parts.items() if k != "libraries"}), measured


def measure(policy: Any, work: Callable[[], object]) -> int:
    """Peak bytes: on a GPU PyTorch's own count; on a CPU every allocation and release that the profiler saw."""
    if policy.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()
    before = size_of(p for module in modules([policy]) for p in (*module.parameters(), *module.buffers()))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    now = top = 0
    for event in profiler.profiler.kineto_results.events():  # pyright: ignore[reportOptionalMemberAccess]
        if event.name() == "[memory]":
            now += event.nbytes()
            top = max(top, now)
    return before + top


KONTEXT, UNO, KLEIN, QWEN, *_ = tiny.FAMILIES


@pytest.mark.parametrize(
    ("family", "policy", "sections"),
    [
        (KONTEXT, {"trainable": "full", "dtype": "bfloat16"}, {}),
        (KONTEXT, {"trainable": "full"}, {"objective": {"use": "nft", "levels": 2}, "rollout": {"steps": None}}),
        (KONTEXT, {"trainable": "full"}, {"method": {"beta": 0.1, "credit": "stepwise"}}),
        (UNO, {}, {"training": {"micro_batch": 2, "ema_decay": 0.9}, "method": {"beta": 0.1}}),
        (KLEIN, {"gradient_checkpointing": True}, {"rollout": {"chunk_prompts": 1}}),
        (QWEN, {}, {"training": {"micro_batch": 4, "optimizer": {"use": "SGD", "lr": 0.1, "momentum": 0.9}}}),
    ],
    ids=lambda value: getattr(value, "policy", None),
)
@pytest.mark.filterwarnings("ignore:There are modules in")
def test_the_estimate_is_what_a_run_takes(
    family: tiny.Family, policy: dict, sections: dict[str, dict], tmp_path: Path
) -> None:
    made = getattr(policies, family.policy)(family.pipeline(), **family.settings, **policy, device="cpu")
    trainer = make(made, family.examples(), tmp_path, **sections)
    expected, measured = expected_and_measured(trainer)
    assert expected.parts["average"] == size_of(copies(trainer))
    assert expected.total == pytest.approx(measured, rel=0.1), str(expected)
    assert all(p.grad is None for p in made.trainable_parameters())


def test_checkpointing_shows_and_weights_are_left_alone(tmp_path: Path) -> None:
    needed = []
    for checkpointing in (False, True):
        policy = policies.FluxKontextPolicy(tiny.kontext_pipeline(), gradient_checkpointing=checkpointing, device="cpu")
        before = {name: tensor.clone() for name, tensor in policy.trainable_state().items()}
        needed.append(expected_memory(make(policy, KONTEXT.examples(), tmp_path).job()))
        assert all(torch.equal(tensor, before[name]) for name, tensor in policy.trainable_state().items())
    assert needed[1].parts["activations"] < 0.7 * needed[0].parts["activations"]
    assert needed[1].parts["weights"] == needed[0].parts["weights"]


# ---- hand-worked


def test_moments_follow_allocations_and_releases() -> None:
    given = torch.zeros(256)
    with Moments(torch.device("cpu")) as seen:
        one = given + 1  # 1024 bytes
        two = one.view(16, 16).t() * 2  # two views, then 1024 more
        del one
        two.add_(1)
        given.mul_(3)
        torch.zeros(64)  # 256 bytes, freed at once
    assert seen.bytes == [0, 1024, 1024, 1024, 2048, 1024, 1024, 1280]


def test_the_peak_is_where_it_is_with_all_rows() -> None:
    """Up to four rows the first moment is the fullest, from six on the second."""
    asked = []

    def moments(rows: int) -> list[int]:
        asked.append(rows)
        return [20 + rows, 5 * rows]

    assert [peak(moments, rows) for rows in (1, 3, 4, 10)] == [21, 23, 24, 50]
    assert max(asked) == 3


def test_optimizer_state_is_what_it_keeps() -> None:
    policy = fakes.LinearPolicy()  # 9 weights and 3 biases
    parameters = policy.trainable_parameters()
    counters = 2 * 4  # AdamW's steps
    assert optimizer_bytes(torch.optim.AdamW(parameters)) == 2 * 12 * 4 + counters
    assert optimizer_bytes(torch.optim.SGD(parameters, lr=0.1)) == 0
    assert optimizer_bytes(torch.optim.SGD(parameters, lr=0.1, momentum=0.9)) == 12 * 4

    class Stubborn(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            self.param_groups[0]["params"][0].sum().item()

    assert optimizer_bytes(Stubborn(parameters, lr=0.1)) == 2 * 12 * 4


def test_a_resumed_optimizer_counts_once(tmp_path: Path) -> None:
    trainer = make(fakes.LinearPolicy(), fakes.examples(), tmp_path)
    trainer.train()
    assert expected_memory(trainer.job()).parts["optimizer"] == 2 * 12 * 4 + 2 * 4


def test_modules_are_found_inside_what_holds_them() -> None:
    class Holder:
        def __init__(self, inside: object) -> None:
            self.inside = inside

    linear = nn.Linear(2, 2)
    assert modules([Holder(Holder(linear)), fakes.red]) == [linear]
    tied = nn.Linear(2, 2, bias=False)
    tied.weight = linear.weight
    assert size_of([*linear.parameters(), *tied.parameters()]) == 4 * 4 + 2 * 4


def test_what_is_shown() -> None:
    gib = 2**30
    shown = str(MemoryEstimate({"weights": int(2.1 * gib), "optimizer": gib // 25, "activations": int(0.8 * gib)}))
    assert shown == "2.9 GiB: weights 2.1, activations 0.8"


def test_a_full_device_is_one_sentence() -> None:
    estimate = MemoryEstimate({"weights": 20 * 2**30, "activations": 9 * 2**30})
    with (
        pytest.raises(
            UserError, match=r"needs about 29.0 GiB: weights 20.0, activations 9.0 .*lower training.micro_batch"
        ),
        explain_full_device(torch.device("cuda:0"), estimate=estimate),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")


# ---- the table of docs/policies.md


def large(policy: str, **settings: Any) -> Any:
    """A wider transformer with random weights, for 144 tokens of picture and as many of reference."""
    from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, QwenImageTransformer2DModel

    family = next(family for family in tiny.FAMILIES if family.policy == policy)
    kinds: dict[str, Any] = {
        "Flux2KleinPolicy": Flux2Transformer2DModel,
        "QwenImageEditPolicy": QwenImageTransformer2DModel,
    }
    kind = kinds.get(policy, FluxTransformer2DModel)
    pipeline = family.pipeline()
    config = dict(pipeline.transformer.config) | {"num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 8}
    config |= {"axes_dims_rope": (16, 16, 16, 16) if policy == "Flux2KleinPolicy" else (16, 24, 24)}
    if "num_single_layers" in config:
        config["num_single_layers"] = 4
    torch.manual_seed(0)
    pipeline.transformer = kind.from_config(config).eval()
    sizes = {"resolution": 48, "reference_resolution": 48}
    return getattr(policies, policy)(pipeline, **{**family.settings, **sizes, **settings}), [
        tiny.example(name, "a red hat", ((48, 48),)) for name in "ab"
    ]


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Kontext, LoRA": ("FluxKontextPolicy", {}),
    "Kontext, LoRA, bfloat16": ("FluxKontextPolicy", {"dtype": "bfloat16"}),
    "Kontext, LoRA, checkpointing": ("FluxKontextPolicy", {"gradient_checkpointing": True}),
    "Kontext, full": ("FluxKontextPolicy", {"trainable": "full"}),
    "UNO, LoRA": ("UnoPolicy", {}),
    "FLUX.2-klein, LoRA": ("Flux2KleinPolicy", {}),
    "Qwen-Image-Edit, LoRA": ("QwenImageEditPolicy", {}),
}


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def measure_case(name: str, how: str) -> None:
    """Print expected and measured MiB: what tensors took, or what the process held (both the same on a GPU)."""
    policy, settings = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(*large(policy, **settings), Path(folder), rollout={"num_generations": 2})
        if how == "tensors":
            expected, measured = expected_and_measured(trainer)
            say(f"{expected.total / 2**20} {measured / 2**20}")
        else:
            start = Start()
            records = RunFolder(trainer.train(start).run).records()
            say(f"{start.memory.total / 2**20} {records[-1]['memory/peak_gib'] * 2**10}")


def main() -> None:
    say("| model | expected | measured | | expected, with libraries | measured | |\n|---|---|---|---|---|---|---|")
    for name in CASES:
        cells = []
        for how in ("tensors", "process"):
            command = [sys.executable, __file__, name, how]
            last = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            expected, measured = map(float, last.split())
            cells += [f"{expected:.0f}", f"{measured:.0f}", f"{expected / measured - 1:+.1%}"]
        say(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    measure_case(*sys.argv[1:]) if sys.argv[1:] else main()
