import numpy as np
import pytest
import torch

from customized_grpo.data.images import to_tensor
from customized_grpo.toyworld.dataset import ToyWorld, toy_examples, toy_reference
from customized_grpo.toyworld.oracle import PromptShown, SubjectKept
from customized_grpo.toyworld.world import KINDS, prompt_split, subject_split


def test_example_is_a_pure_function_of_seed_and_index() -> None:
    short, long = ToyWorld("train", 3, seed=4), ToyWorld("train", 100, seed=4)
    for n in (0, 2):
        assert (short[n].id, short[n].prompt, short[n].truth_subject) == (
            long[n].id,
            long[n].prompt,
            long[n].truth_subject,
        )
        assert np.array_equal(np.asarray(short[n].references[0]), np.asarray(long[n].references[0]))
    assert ToyWorld("train", 3, seed=5)[0].truth_subject != short[0].truth_subject


def test_splits_are_disjoint_in_subjects_and_in_prompts() -> None:
    for split in ("train", "eval"):
        examples = toy_examples(split, 40)
        assert len({e.id for e in examples}) == 40
        for e in examples:
            assert subject_split(e.truth_subject) == split
            assert prompt_split(e.subject, e.truth_scene) == split


def test_example_carries_what_a_policy_needs() -> None:
    example = toy_reference(7)
    assert example.prompt.split()[0] == "a"
    assert example.subject in example.prompt
    assert example.references[0].size == (64, 64)
    assert example.references[0].mode == "RGB"
    assert example.masks[0] is not None
    assert example.masks[0].mode == "L"
    assert example.truth_scene.recolour != example.truth_subject.colour


def test_larger_examples_are_the_same_tasks_with_right_articles() -> None:
    small, large = ToyWorld("eval", 60, seed=1)[:], ToyWorld("eval", 60, seed=1, size=128)[:]
    assert [(e.truth_subject, e.truth_scene) for e in small] == [(e.truth_subject, e.truth_scene) for e in large]
    assert {e.references[0].size for e in large} == {e.target.size for e in large} == {(128, 128)}
    assert any(e.prompt.startswith("an ") for e in large)
    assert not any(" a orange" in e.prompt for e in large)


def test_sequence_protocol() -> None:
    world = ToyWorld("eval", 5, per_subject=2)
    assert world[0].truth_subject == world[1].truth_subject != world[2].truth_subject
    assert world[-1].id == world[4].id
    assert [e.id for e in world[1:3]] == [world[1].id, world[2].id]
    with pytest.raises(IndexError, match="5 toy examples"):
        world[5]


def test_kinds_can_be_chosen() -> None:
    assert {e.truth_scene.kind for e in ToyWorld("eval", 8, kinds=("property",))} == {"property"}


def test_an_example_says_its_kind() -> None:
    examples = ToyWorld("eval", 24)[:]
    assert [e.kind for e in examples] == [e.truth_scene.kind for e in examples]
    assert {e.kind for e in examples} == set(KINDS)
    for world in (ToyWorld("eval", 12, per_subject=3), ToyWorld(count=12, kinds=("property", "companion"))):
        assert world.all_kinds() == [example.kind for example in world]


def test_intervals_tell_creatures_apart_and_keep_the_prompts_of_one_together():
    from customized_grpo.train.evaluation import cluster

    names = [cluster(example) for example in ToyWorld("eval", 6, per_subject=2)]
    assert names[0] == names[1] != names[2]
    assert len(set(names)) == 3


def test_the_target_shows_what_the_prompt_asks_for() -> None:
    examples = toy_examples("eval", 24)
    targets = torch.stack([to_tensor(example.target) for example in examples])
    assert PromptShown()(targets, examples).mean() > 0.9
    assert SubjectKept()(targets, examples).mean() > 0.9
