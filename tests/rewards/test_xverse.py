"""XVerseBench's scores against a record of its authors' code, whose models are replaced by tables."""

import json
from pathlib import Path

import pytest
import torch

from customized_grpo.errors import UserError
from customized_grpo.rewards.contract import check_reward
from customized_grpo.rewards.xverse import AnsweredQuestions, FoundSubjects, read_samples, share_of_yes
from customized_grpo.structures import Example
from rewards import tiny

RECORD = json.loads((Path(__file__).parent / "parity" / "xversebench.json").read_text(encoding="utf-8"))
SAMPLES = RECORD["samples"]


@pytest.mark.parametrize("case", RECORD["questions"])
def test_a_question_counts_with_those_it_depends_on(case):
    assert share_of_yes(case["answers"], case["depends"]) == pytest.approx(case["score"])


class Found(FoundSubjects):
    """What the record says is found; the red of an image is its number in the grid."""

    def cosines(self, image, reference, noun):
        number, part = map(int, noun.split()[1:])
        return [cosine / 100 for cosine in SAMPLES[number][part][1][image.getpixel((0, 0))[0]]]


class Answers(AnsweredQuestions):
    """Yes to questions that name the red of the image."""

    def answer(self, image, question):
        return "yes" if str(image.getpixel((0, 0))[0]) in question else "no"


@pytest.fixture
def clone(tmp_path):
    return tiny.xverse_clone(tmp_path, [[folder for folder, _ in parts] for parts in SAMPLES])


def examples(clone):
    samples = {**read_samples(clone, "single"), **read_samples(clone, "multi")}
    references = tiny.example().references[:1]
    return [Example(id, sample.prompt, references * len(sample.parts)) for id, sample in samples.items()]


def grid(number=4):
    images = torch.zeros(number, 3, 8, 8)
    images[:, 0] = (torch.arange(number) / 255).view(-1, 1, 1)
    return images


@pytest.mark.parametrize(("people", "recorded"), [(True, "people"), (False, "things")])
def test_subjects_score_what_the_authors_code_gives_them(people, recorded, clone):
    reward = Found(clone, people=people)
    record = RECORD[recorded]
    for number, example in enumerate(examples(clone)):
        theirs = [list(of_image.values()) for of_image in record["scores"][str(number)]]
        means = [sum(scores) / len(scores) if scores else torch.nan for scores in theirs]
        assert reward(grid(), [example] * 4).tolist() == pytest.approx(means, nan_ok=True)
    every = [score for images in record["scores"].values() for scores in images for score in scores.values()]
    assert f"{sum(every) / len(every):.2f}" == record["mean"].split()[-1]  # the record is of one piece


def test_matched_people_do_not_share_a_face(clone):
    two = examples(clone)[1]
    # [50, 45] and [48, 9]: the same face is nearest to both; apart, 45 + 48 is more than 50 + 9
    best, matched = (Found(clone, matched=matched)(grid(1), [two]).item() for matched in (False, True))
    assert (best, matched) == (pytest.approx(49), pytest.approx(46.5))
    # [12] and [7]: one face for two people
    assert Found(clone, matched=True)(grid(2), [two] * 2)[1].item() == pytest.approx(6)
    assert Found(clone, matched=True)(grid(4), [two] * 4)[3].item() == 0  # no face


def test_questions_are_those_of_the_examples_own_prompt(tmp_path):
    asked = [
        {"qid2question": {"1": "Is it 0?", "2": "Is it 0 or 1?"}, "qid2dependency": {"1": [0], "2": [1]}},
        {"qid2question": {"1": "Is it 1?"}, "qid2dependency": {"1": [0]}},
    ]
    clone = tiny.xverse_clone(tmp_path, [["human"], ["object"]], asked)
    first, second = examples(clone)
    reward = Answers(clone)
    assert reward(grid(2), [first, first]).tolist() == [100, 0]  # the second depends on the first
    assert reward(grid(2), [second, second]).tolist() == [0, 100]
    check_reward(reward, grid(2), [first, second])


def test_another_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"XVerseBench_single\.json'; give a clone of github.com/bytedance/XVerse"):
        Answers(tmp_path)
