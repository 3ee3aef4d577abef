"""How many rows one iteration has."""

import pytest

from customized_grpo.plan.rows import count_rows
from customized_grpo.settings.parse import parse_config
from customized_grpo.train.settings import TrainerConfig


def counted(processes: int = 1, **sections: object) -> tuple[float, ...]:
    tree = {
        "rollout": {"num_generations": 3, "num_inference_steps": 5},
        "training": {"iterations": 4, "prompts_per_iteration": 2},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}  # pyright: ignore
    return tuple(count_rows(parse_config(tree, TrainerConfig), processes))


def test_the_first_velocity_of_a_group_is_shared() -> None:
    everywhere = {"steps": "all_steps"}
    assert counted(rollout=everywhere) == (2 + 4 * 6, 6, 4 * 6, 0)
    assert counted(rollout={**everywhere, "share_initial_noise": False})[0] == 5 * 6
    assert counted(2, rollout=everywhere) == (13, 3, 12, 0)


def test_a_window_that_moves_is_counted_on_average() -> None:
    window = {"use": "sliding_window", "size": 1, "iterations_per_window": 1}
    sampled, _, trained, _ = counted(rollout={"steps": window})
    assert trained == 6
    assert sampled == pytest.approx(sum(2 * (first + 1) + 6 * (4 - first) for first in range(4)) / 4)


@pytest.mark.parametrize(
    ("sections", "frozen"),
    [
        ({"training": {"old_log_probs": "recompute"}}, 12),
        ({"training": {"old_log_probs": "recompute", "inner_epochs": 2, "updates_per_epoch": 1}}, 0),
        ({"method": {"beta": 0.1}}, 24),
        ({"training": {"inner_epochs": 2}, "method": {"beta": 0.1}}, 48),
    ],
)
def test_passes_without_gradient_are_counted(sections: dict, frozen: int) -> None:
    assert counted(rollout={"steps": "all_steps"}, **sections)[3] == frozen


def test_other_objectives_count_their_old_policy() -> None:
    _, decoded, trained, frozen = counted(objective={"use": "nft", "levels": 2})
    assert (decoded, trained) == (6, 12)
    assert frozen >= 12
