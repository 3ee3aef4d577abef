import numpy as np
import pytest

from customized_grpo.toyworld.world import ATTRIBUTES
from tools.labelled import FAULTS, labelled, precision_and_recall


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_pictures_are_functions_of_their_number_and_answers_are_balanced_in_both_halves(attribute) -> None:
    items, again = labelled(attribute, 40), labelled(attribute, 20)
    assert all(np.array_equal(a.pixels, b.pixels) and a.value == b.value for a, b in zip(items, again, strict=False))
    for mending in (True, False):
        half = [item for item in items if item.for_mending == mending]
        assert sum(item.shown for item in half) == 10
        assert {item.fault for item in half if not item.shown} == {*FAULTS}


def test_precision_and_recall() -> None:
    items = labelled("ears", 4)  # yes, yes, no, no
    assert precision_and_recall(items, [True, False, True, False]) == (0.5, 0.5)
    assert precision_and_recall(items, [True, True, False, False]) == (1.0, 1.0)
    assert precision_and_recall(items, [False] * 4) == (0.0, 0.0)
