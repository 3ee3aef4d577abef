import pytest

from customized_grpo.errors import UserError
from customized_grpo.rewards import Hpsv3Reward


def test_without_its_package_it_says_what_to_do():
    with pytest.raises(UserError, match=r"needs the hpsv3 package.*RemoteReward"):
        Hpsv3Reward()
