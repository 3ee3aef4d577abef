"""Names that packages import when they are first used."""

import customized_grpo
from customized_grpo import policies, rewards, stubs


def test_every_name_of_a_stub_loads_and_is_listed() -> None:
    for package in (customized_grpo, policies, rewards):
        assert len(package.__all__) > 8
        assert dir(package) == sorted(package.__all__)
        assert all(getattr(package, name) is not None for name in package.__all__)
        assert getattr(package, "absent", None) is None


def test_attach() -> None:
    load, names, listed = stubs.attach("customized_grpo.rewards", rewards.__file__)
    assert names() == listed == rewards.__all__
    assert load("ClipReward") is rewards.ClipReward
