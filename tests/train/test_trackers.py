import json

import pytest

from customized_grpo.errors import UserError
from customized_grpo.train.settings import TrackingSettings
from customized_grpo.train.trackers import check_trackers, provenance


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("tensorbord", r"Did you mean 'tensorboard'\?"), ("clearml", r"'clearml', which is not installed; .*pip install")],
)
def test_a_tracker_that_is_not_there_is_refused(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_trackers(TrackingSettings(log_with=name))  # pyright: ignore[reportArgumentType] - one is a list too


def test_a_number_has_versions_and_hardware_beside_it() -> None:
    facts = provenance(["cgrpo", "train"])
    assert facts["versions"]["torch"]
    assert facts["hardware"]
    json.dumps(facts)
