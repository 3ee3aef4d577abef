"""XVerseBench's scores, from what a class of yours finds in an image: its models are no part of this package."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from PIL.Image import Image
from torch import Tensor

from customized_grpo.data.images import to_pil
from customized_grpo.errors import UserError
from customized_grpo.functional.similarity import best_assignment
from customized_grpo.store import read_json
from customized_grpo.structures import Example

LISTS = ("single", "multi")
FINDS = 3
"""Of what is no person, the first so many finds count, as in eval/tools/idip_sam-dino_score.py at 65e2581."""


@dataclass(frozen=True)
class Part:
    """A reference of a prompt."""

    path: str
    """Below the clone."""
    noun: str

    @property
    def folder(self) -> str:
        """human, animal or object."""
        return Path(self.path).parent.name


@dataclass(frozen=True)
class Sample:
    """A prompt with its references and its questions, which are answered with yes or no."""

    prompt: str
    parts: tuple[Part, ...]
    questions: Mapping[str, str]
    depends: Mapping[str, Sequence[int]]
    """By question, those that must be answered with yes for it to count; 0 stands for none."""


def read_samples(clone: str | Path, name: str) -> dict[str, Sample]:
    """The samples of a list, "single" or "multi", by the ids of their examples.

    Raises:
        UserError: if the clone has no such list.
    """
    files = [Path(clone).expanduser() / "eval" / "tools" / f"XVerseBench_{name}{end}.json" for end in ("", "_DSG")]
    for file in files:
        if not file.is_file():
            raise UserError(f"There is no '{file}'; give a clone of github.com/bytedance/XVerse.")
    found = {}
    for number, (entry, asked) in enumerate(zip(*map(read_json, files), strict=True)):
        (modulation,) = entry["modulation"]
        words = zip(modulation["src_inputs"], modulation["use_words"], strict=True)
        parts = tuple(Part(source["image_path"], noun) for source, (_, noun, *_) in words)
        found[f"{name}-{number:03d}"] = Sample(
            entry["prompt"], parts, asked["qid2question"], asked["qid2dependency"]
        )  # fmt: skip
    return found


def share_of_yes(answers: Mapping[str, str], depends: Mapping[str, Sequence[int]]) -> float:
    """100 x the share of questions answered with "yes", as are all that they depend on themselves.

    Source: DPG score of XVerse, eval/tools/dpg_score.py at 65e2581.
    """
    yes = {question: answer == "yes" for question, answer in answers.items()}
    counted = [yes[q] and all(yes.get(str(other), True) for other in depends.get(q, ())) for q in yes]
    return 100 * fmean(counted)


class _Samples(ABC):
    RUNTIME = ("data",)

    def __init__(self, data: str | Path) -> None:
        self.samples = {id: sample for name in LISTS for id, sample in read_samples(data, name).items()}

    @torch.no_grad()
    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """Shape (B,), on CPU."""
        pairs = zip(map(to_pil, images.cpu()), examples, strict=True)
        return torch.tensor([self._score(image, example, self.samples[example.id]) for image, example in pairs])

    @abstractmethod
    def _score(self, image: Image, example: Example, sample: Sample) -> float: ...


class AnsweredQuestions(_Samples):
    """DPG: 100 x the share of a prompt's questions that a model answers with yes.

    Args:
        data: a clone of github.com/bytedance/XVerse.
    """

    @abstractmethod
    def answer(self, image: Image, question: str) -> str:
        """The answer of a model to a question about an image; "yes" counts."""

    def _score(self, image: Image, example: Example, sample: Sample) -> float:
        answers = {number: self.answer(image, question) for number, question in sample.questions.items()}
        return share_of_yes(answers, sample.depends)


class FoundSubjects(_Samples):
    """ID-Sim, IP-Sim and matched identity: 100 x the mean over references of a cosine with what is found in the image.

    0 for a reference where nothing is found, and NaN for an image without such references.

    Args:
        data: a clone of github.com/bytedance/XVerse.
        people: whether references of people count, or the others.
        matched: pair each reference with another find, such that the sum is the largest. By default each reference
            takes the most similar find, so that one face may stand for two people.
    """

    def __init__(self, data: str | Path, *, people: bool = True, matched: bool = False) -> None:
        super().__init__(data)
        self.people, self.matched = people, matched

    @abstractmethod
    def cosines(self, image: Image, reference: Image, noun: str) -> Sequence[float]:
        """Of a reference with each of what is found in the image; with `matched`, in the same order for all."""

    def _score(self, image: Image, example: Example, sample: Sample) -> float:
        most = None if self.people else FINDS
        found = [
            list(self.cosines(image, reference, part.noun))[:most]
            for reference, part in zip(example.references, sample.parts, strict=True)
            if (part.folder == "human") == self.people
        ]
        if not found:
            return torch.nan
        if self.matched:
            table = torch.tensor(found)
            return 100 * sum(float(table[pair]) for pair in best_assignment(table)) / len(found)
        return 100 * fmean(max(row, default=0.0) for row in found)
