import json
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from customized_grpo.errors import UserError
from customized_grpo.store.run import RunFolder
from customized_grpo.store.scores import Scores
from customized_grpo.train.settings import TrackingSettings
from customized_grpo.train.trackers import check_trackers, end_training, provenance, start_trackers, track_evaluation


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("tensorbord", r"Did you mean 'tensorboard'\?"), ("clearml", r"'clearml', which is not installed; .*pip install")],
)
def test_a_tracker_that_is_not_there_is_refused(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_trackers(TrackingSettings(log_with=name))  # pyright: ignore[reportArgumentType] - one is a list too


def test_a_number_has_versions_and_hardware_beside_it() -> None:
    facts = provenance()
    assert facts["versions"]["torch"]
    assert facts["hardware"]
    json.dumps(facts)


def test_tensorboard_gets_held_out_means_by_kind_and_the_grid_as_an_image(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = np.array([[[0.5], [1.0], [np.nan]]])
    kinds = ("recontext", "property", "property")
    scores = Scores(values, ("fit",), ("fit",), ("a", "b", "c"), ("a", "b", "c"), kinds, ("", "", ""), iteration=10)
    Image.new("RGB", (8, 6), "red").save(tmp_path / "grid.png")
    accelerator = Accelerator(cpu=True)
    start_trackers(accelerator, TrackingSettings(), RunFolder(tmp_path))
    track_evaluation(accelerator, scores, tmp_path / "grid.png")
    track_evaluation(accelerator, scores, tmp_path / "absent.png")
    end_training(accelerator)
    found = EventAccumulator(str(next(tmp_path.rglob("events.out.*")).parent)).Reload()
    means = {tag: found.Scalars(tag)[0] for tag in found.Tags()["scalars"]}
    assert {tag: (mean.step, mean.value) for tag, mean in means.items()} == {
        "held_out/fit": (10, 0.75), "held_out/recontext/fit": (10, 0.5), "held_out/property/fit": (10, 1.0),
    }  # fmt: skip
    (image,) = found.Images("samples")
    assert (image.step, image.width, image.height) == (10, 8, 6)
