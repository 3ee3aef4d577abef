"""Every recipe of a real model is a valid configuration, and the paper's says what the paper says."""

from pathlib import Path

import pytest
import torch

from customized_grpo.build import bind, check_spec
from customized_grpo.config import load_config
from customized_grpo.policies.lora import LoraSettings

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = ("kontext", "uno-syncd", "flux2-klein", "qwen-image-edit")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_names_only_settings_that_exist(name):
    config = load_config(RECIPES / f"{name}.yaml")
    check_spec(config.policy, "policy")
    LoraSettings(**config.policy.arguments["lora"])
    for spec in config.rewards.values():
        check_spec(spec, "reward")
    plan = bind(config.rollout.steps, "steps")(
        0, config.rollout.num_inference_steps, generator=torch.Generator().manual_seed(0)
    )
    assert len(plan.trained)
    rows = config.training.prompts_per_iteration * config.rollout.num_generations
    assert rows % config.training.micro_batch == 0
    assert config.policy.arguments["dtype"] != "bfloat16" or config.training.old_log_probs == "recompute"


def test_the_papers_recipe():
    config = load_config(RECIPES / "uno-syncd.yaml")
    policy, rollout = config.policy.arguments, config.rollout
    assert (policy["lora"]["rank"], policy["shift"], policy["guidance_scale"]) == (512, 3.0, 4.0)
    assert (rollout.num_generations, rollout.num_inference_steps) == (12, 25)
    assert rollout.dynamics.arguments["noise_level"] == 0.4
    assert config.method.advantage.arguments["gamma"] == 0.4
    assert config.method.clip_range == 1e-4
    assert config.training.optimizer.arguments["lr"] == 2e-5
    assert list(config.rewards) == ["prompt", "identity"]
    plan = bind(rollout.steps, "steps")(0, 25, generator=torch.Generator().manual_seed(0))
    assert (len(plan.trained), len(plan.stochastic)) == (14, 24)
