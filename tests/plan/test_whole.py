"""Small models say what a large one takes."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from customized_grpo import policies
from customized_grpo.config import load_config
from customized_grpo.plan.fakes import FakeFamily, without_contents
from customized_grpo.plan.whole import Trace, WholeModel, combined, extended
from customized_grpo.settings import Spec
from customized_grpo.train.memory import Passes
from policies import tiny

DEPTH = {"num_layers": 5, "num_single_layers": 6}


def written(first: int, second: int) -> list[Trace]:
    """The forward and the backward pass over blocks of two kinds that end alike, and keep 5 and 2 each."""
    held, phases = 0, []
    for forward in (True, False):
        trace, sign = [], 1 if forward else -1
        for kind, count, kept in (("a", first, 5), ("b", second, 2))[::sign]:
            for _ in range(count):
                trace += [(held + room, f"{kind} {room}") for room in (3, 40 if kind == "a" else 30, 9, 8, 7, 6)]
                trace += [(held + 1, "same"), (held, "same")]
                held += sign * kept
        phases.append(Trace(*zip(*trace, strict=True)))
    return phases


@pytest.mark.parametrize("size", [(2, 2), (19, 38), (40, 3), (3, 50)])
def test_the_highest_moment_of_a_large_pass_is_that_of_the_pass_itself(size: tuple[int, int]) -> None:
    missing = {"a": size[0] - 2, "b": size[1] - 2}
    for small, more, other, large in zip(written(2, 2), written(3, 2), written(2, 3), written(*size), strict=True):
        assert max(extended(small, {"a": more, "b": other}, missing)) == max(large.bytes)


def deep_kontext(folder: Path) -> Path:
    """A pipeline on disk with several blocks of each kind."""
    from diffusers import FluxTransformer2DModel

    pipeline = tiny.kontext_pipeline()
    config = dict(pipeline.transformer.config) | DEPTH
    pipeline.transformer = FluxTransformer2DModel.from_config(config)
    pipeline.save_pretrained(folder)
    return folder


EXAMPLE = tiny.example()


def whole(family: FakeFamily, *, checkpointing: bool) -> WholeModel:
    make = partial(family.policy, checkpointing=checkpointing, quantize="none")
    few = {name: min(2, count) for name, count in family.blocks.items()}
    missing = {name: count - few[name] for name, count in family.blocks.items()}
    more = {name: Passes(make({**few, name: 3}), EXAMPLE) for name in missing}
    return WholeModel(make(few), EXAMPLE, more, missing)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fake_passes_take_what_real_ones_allocate(checkpointing: bool, tmp_path: Path) -> None:
    folder = deep_kontext(tmp_path)
    settings: dict[str, Any] = {"path": str(folder), "lora": {"rank": 4}}
    policy = policies.FluxKontextPolicy.from_pretrained(**settings, gradient_checkpointing=checkpointing, device="cpu")
    real = Passes(policy, EXAMPLE)
    cases = [(name, count) for count in (2, 3) for name in ("forward", "learn", "decode")]
    measured = {case: max(getattr(real, case[0])(case[1])) for case in cases}
    with without_contents():
        fake = whole(FakeFamily(Spec(use="FluxKontextPolicy", **settings)), checkpointing=checkpointing)
        expected = {case: max(getattr(fake, case[0])(case[1])) for case in cases}
    assert expected == pytest.approx(measured, rel=0.05)
    assert (fake.conditioning_bytes, fake.picture_bytes) == (real.conditioning_bytes, real.picture_bytes)


def test_operations_are_those_of_the_formula() -> None:
    """FLUX.1-Kontext at 512 x 512 with one reference of that size, rank 64 on all linear layers of the blocks."""
    spec = load_config("kontext").policy
    with without_contents():
        model = whole(FakeFamily(spec), checkpointing=True)
        forward, learn = model.operations("forward"), model.operations("learn")
    width, rank, picture, text = 3072, 64, 2 * 32 * 32, 512
    tokens = picture + text
    double = single = 12 * width**2
    adapters = {"double": rank * width * (4 * 2 + 5 + 5), "single": rank * width * (3 * 2 + 5 + 6)}
    attention = 2 * 2 * tokens**2 * width
    linear = 2 * tokens * (19 * (double + adapters["double"]) + 38 * (single + adapters["single"]))
    assert sum(forward.values()) == pytest.approx(linear + 57 * attention, rel=0.02)
    of_adapters = 2 * tokens * (19 * adapters["double"] + 38 * adapters["single"])
    backward = linear + of_adapters + 57 * 2.5 * attention
    assert sum(learn.values()) == pytest.approx(2 * (linear + 57 * attention) + backward, rel=0.02)
    assert set(forward) == {torch.bfloat16}


def test_operations_are_added_by_dtype() -> None:
    total = combined((2.0, {torch.float32: 3.0}), (1.0, {torch.bfloat16: 1.0, torch.float32: 1.0}))
    assert total == {torch.float32: 7.0, torch.bfloat16: 1.0}
