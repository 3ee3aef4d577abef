"""Objectives on real models: LoRA and full training, bfloat16, recomputed activations, all families."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from customized_grpo.assemble import build_policy
from customized_grpo.config import load_config
from policies import tiny
from policies.runs import train, write_run

KONTEXT, UNO, KLEIN, QWEN, KV, DEV = tiny.FAMILIES
QWEN_2511 = replace(QWEN, pipeline=partial(tiny.qwen_pipeline, zero_cond_t=True))
LORA = {"dtype": "bfloat16", "gradient_checkpointing": True}
UNGUIDED = {**LORA, "true_cfg_scale": 1.0}
NFT = "{use: nft, levels: 2}"
OBJECTIVES = (NFT, "{use: awm, levels: 2}", "{use: grpo, divergence_threshold: 1e-5}")
"""Recipes run those that are missing below."""
CASES = [
    *((KONTEXT, LORA, objective) for objective in OBJECTIVES),
    (KONTEXT, {"trainable": "full", "dtype": "float32"}, NFT),
    (KONTEXT, {"trainable": "full", **LORA}, "{use: awm, levels: 2}"),
    (UNO, {"dtype": "float32"}, NFT),
    *((KV, LORA, objective) for objective in OBJECTIVES),
    *((DEV, LORA, objective) for objective in OBJECTIVES[:2]),
    (KLEIN, UNGUIDED, OBJECTIVES[1]),
    *((QWEN_2511, UNGUIDED, objective) for objective in OBJECTIVES),
]


@pytest.mark.filterwarnings("ignore:Flux2KleinKVPolicy has a model that was distilled to few steps")
@pytest.mark.parametrize(
    ("family", "settings", "objective"), CASES, ids=lambda case: getattr(case, "policy", str(case))
)
def test_it_trains_with_an_old_policy_behind_it(
    family: tiny.Family, settings: dict[str, Any], objective: str, tmp_path: Path
) -> None:
    file = write_run(family, tmp_path, **settings)
    words = [f"objective={objective}", "checkpoint.every=1", "rollout.num_generations=4", "method.beta=0.1"]
    with family.loadable():
        start = build_policy(load_config(file, words)).trainable_state()
        run = train(file, *words)
    for record in run.records():
        assert record["update/skipped"] == 0
        assert record["update/grad_norm"] > 0
    assert run.records()[1]["update/kl"] > 0
    trained = [load_file(run.checkpoints / f"iteration-{n:06d}" / "trainable.safetensors") for n in (1, 2)]
    kept = run.checkpoints / "iteration-000002" / "objective.safetensors"
    assert kept.exists() == ("grpo" not in objective)
    old_policy = load_file(kept) if kept.exists() else {}
    for name, old in old_policy.items():
        expected = 0.3 * (0.3 * start[name] + 0.7 * trained[0][name]) + 0.7 * trained[1][name]
        torch.testing.assert_close(old, expected, rtol=0, atol=1e-6)
    assert not old_policy or any(not torch.equal(old, trained[1][name]) for name, old in old_policy.items())
