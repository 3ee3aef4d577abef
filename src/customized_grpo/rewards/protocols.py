"""What judges are asked about an image, and how their answers are read: our rubrics and published rewards."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL.Image import Image

from customized_grpo.store.yaml_text import read_yaml
from customized_grpo.structures import Example

TOP_SCORE = 4
MAX_CHARACTERS = 20_000
"""Of the end of an answer, in which the score is looked for."""

_TEXTS: dict[str, Any] = read_yaml(Path(__file__).with_name("rubrics.yaml"))
IDENTITY, PROMPT, CONSISTENT, FOLLOWS = (_TEXTS[name] for name in ("identity", "prompt", "consistent", "follows"))
EDITED, QUALITY = (f"{_TEXTS['artist']}\n{_TEXTS[name]}" for name in ("edited", "quality"))
FULFILS, SAME_SUBJECTS = (f"{_TEXTS['grader']}\n{_TEXTS[name]}" for name in ("fulfils", "same_subjects"))

# UnifiedReward-Edit/edit_pointwise_*.py of https://github.com/CodeGoat24/UnifiedReward at
# ff6f520247a2d36e2aff7b2ba53a935afd437f66, MIT.
_UNIFIED = {'{\n"': '{\n\n"', "[...]\n": "[...],\n", "instruction: <": "instruction:<"}
"""What UnifiedReward-Edit words otherwise than EDITED and QUALITY."""


def _reworded(text: str, changes: Mapping[str, str]) -> str:
    for before, after in changes.items():
        text = text.replace(before, after)
    return text


_THOUGHT, _THINKING = (
    re.compile(rf"[<\[◁]{slash}(?:think|thinking|thought|reasoning)[>\]▷]", re.IGNORECASE) for slash in ("/", "")
)

_SCORE = re.compile(r'"score"\s*:\s*"?', re.IGNORECASE)
_LIST = re.compile(r"""score["']?\s*[:：]\s*\[([^\]]*)""", re.IGNORECASE)

FORMAT = {
    "type": "json_schema",
    "json_schema": {
        "name": "verdict",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {
                "findings": {"type": "string", "description": "What agrees, what does not: a sentence or two."},
                "score": {"type": "integer", "enum": list(range(TOP_SCORE + 1))},
            },
            "required": ["findings", "score"],
            "additionalProperties": False,
        },
    },
}  # fmt: skip
IN_WORDS = f'Answer with a JSON object: {{"findings": "a sentence or two", "score": 0 to {TOP_SCORE}}}.'
"""What is said where the schema is not sent."""


@dataclass(frozen=True)
class Question:
    """One request about one image."""

    text: str
    """In published ones, <instruction> stands for the prompt."""
    references: int | None = 1
    """How many of the example's references are shown before the image; None shows all."""
    by_kind: Mapping[str, str] = field(default_factory=dict[str, str])
    """Other texts, for examples of these kinds."""


@dataclass(frozen=True)
class Protocol:
    """The questions about one image; its score is the geometric mean of what is read from their answers."""

    questions: tuple[Question, ...]
    read: Callable[[Any], float | None]
    """A chat completion to a number; None if there is none in it."""
    expected: str
    """What `read` looks for, in words."""
    fields: Mapping[str, Any]
    """Of the request."""
    published: bool = True
    """Whether pictures and text are sent as its authors do: first all pictures, then the text."""
    label: str = ""
    """Written before each picture, with its number for {}."""
    jpeg_quality: int | None = None
    """Of pictures as they are sent; None sends them without loss, as PNG."""
    longest_side: int | None = None
    """Pixels to which pictures are scaled down; None sends them as they are."""
    text_first: bool = False
    """Whether the text is sent before all pictures."""
    fit: Callable[[Image], Image] = lambda picture: picture
    """How references are resized."""

    def messages(
        self, question: Question, image: Image, example: Example, references: Sequence[Image],
        show: Callable[[Image], dict[str, Any]],
    ) -> list[dict[str, Any]]:  # fmt: skip
        """A question about an image, with the first of `references` as it asks; `show` makes a part of a message."""
        references = references[: question.references]
        if self.published:
            parts: list[dict[str, Any]] = []
            for number, picture in enumerate([*map(self.fit, references), image], start=1):
                parts += [_text(self.label.format(number)), show(picture)] if self.label else [show(picture)]
            text = question.by_kind.get(example.kind, question.text)
            asked = _text(text.replace("<instruction>", example.prompt))
            return [{"role": "user", "content": [asked, *parts] if self.text_first else [*parts, asked]}]
        content: list[dict[str, Any]] = []
        if references:
            content.append(_text(f"The subject{f', a {example.subject}' if example.subject else ''}, in reference:"))
            content += map(show, references)
        content += [_text(f"The instruction: {example.prompt}\nThe generated picture:"), show(image)]
        return [{"role": "system", "content": question.text}, {"role": "user", "content": content}]


def parse_score(answer: Any) -> int | None:
    """The score in a chat completion, or None if there is none from 0 to 4.

    It is taken from the last JSON object with a score, after the model's thinking; the text around it is ignored.
    """
    text, decoder = _verdict(answer), json.JSONDecoder()
    score, start = None, text.find("{")
    while start >= 0:
        end = start + 1
        try:
            found, after = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            found, after = {}, end
        if "score" in (found := {name.lower(): value for name, value in found.items()}):
            score, end = found["score"], after
        start = text.find("{", end)
    if isinstance(score, str) and (match := re.fullmatch(r"\s*(\d)(?:\.0*)?\s*(?:/\s*4)?\s*", score)):
        score = int(match[1])
    if not isinstance(score, (int, float)) or isinstance(score, bool) or score not in range(TOP_SCORE + 1):
        return None
    return int(score)


def expected_score(answer: Any) -> float | None:
    """The expectation of the score from 0 to 4 in a chat completion over the digits that were likely in its place.

    None if there is no score or no log-probabilities. Digits that are not among the likeliest count as impossible.
    """
    tokens = likely_tokens(answer)
    places = list(_SCORE.finditer("".join(token for token, _ in tokens)))
    if parse_score(answer) is None or not places:
        return None
    start, weights = 0, [0.0] * (TOP_SCORE + 1)
    for token, likely in tokens:
        if start + len(token) > places[-1].end():
            before = token[: places[-1].end() - start]
            for other, log_probability in likely.items():
                if digit := re.match(rf"{re.escape(before)}([0-{TOP_SCORE}])(?!\d)", other):
                    weights[int(digit[1])] += math.exp(log_probability)
            break
        start += len(token)
    return sum(score * weight for score, weight in enumerate(weights)) / sum(weights) if any(weights) else None


def choice_of(answer: Any) -> Mapping[str, Any]:
    """The first choice of a chat completion; empty if there is none."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else {}


def content_of(answer: Any) -> str:
    """The text of a chat completion, which some endpoints send in parts; empty if there is none."""
    message = choice_of(answer).get("message")
    content = message.get("content") if isinstance(message, dict) else None
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "".join(text for text in texts if isinstance(text, str))


def likely_tokens(answer: Any) -> list[tuple[str, dict[str, float]]]:
    """Of each token of a chat completion, the token and the log-probabilities of the likeliest at its place.

    Empty if the endpoint gives none.
    """
    found = choice_of(answer).get("logprobs")
    tokens = found.get("content") if isinstance(found, dict) else None
    try:
        return [
            (str(token["token"]), {str(top["token"]): float(top["logprob"]) for top in token["top_logprobs"]})
            for token in tokens or ()
        ]
    except (TypeError, KeyError, ValueError):
        return []


def _verdict(answer: Any) -> str:
    """The end of the text of a chat completion, without the model's thinking."""
    text = _THOUGHT.split(content_of(answer))[-1]
    return _THINKING.split(text)[0][-MAX_CHARACTERS:]  # thinking that was cut off holds no verdict


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def lowest_of_two(answer: Any) -> float | None:
    """The lower of two scores from 0 to 25 in a list called score, from 0 to 10; None without them.

    The list is looked for as such, because models forget to escape quotation marks before it.
    """
    lists = _LIST.findall(_verdict(answer))
    numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", lists[-1])] if lists else []
    if len(numbers) != 2 or not all(0 <= number <= 25 for number in numbers):
        return None
    return min(numbers) / 2.5


def score_of_ten(answer: Any) -> float | None:
    """The score from 0 to 10 in the one JSON object of an answer that may hold line breaks, or an answer that is only a
    whole number; None without. It is read before any thinking is told apart, as OmniContext reads it."""
    text = content_of(answer)
    start, end = text.find("{"), text.rfind("}") + 1
    try:
        found = json.loads(text[start:end].replace("\n", "")) if start >= 0 and end else {"score": int(text)}
        score = found["score"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return float(score) if isinstance(score, (int, float)) and 0 <= score <= 10 else None


def _sixteenths(picture: Image) -> Image:
    """At most 1024 x 1024 pixels, with sides that are multiples of 16, as OmniContext shows references."""
    width, height = picture.size
    scale = min(1.0, math.sqrt(1024 * 1024 / (width * height)))
    return picture.resize((int(width * scale) // 16 * 16, int(height * scale) // 16 * 16))


def yes_of_yes_or_no(answer: Any) -> float | None:
    """The probability of Yes among Yes and No as the first token, from its log-probabilities; None without either."""
    likely = next(iter(likely_tokens(answer)), ("", {}))[1]
    yes, no = (math.exp(likely.get(word, -math.inf)) for word in ("Yes", "No"))
    return yes / (yes + no) if yes + no else None


def graded(rubric: Protocol) -> Protocol:
    """One of our rubrics with the expectation of the score in place of the score."""
    fields = {**rubric.fields, "logprobs": True, "top_logprobs": 10}
    return replace(rubric, read=expected_score, expected=f"{rubric.expected} with log-probabilities", fields=fields)


def _rubric(*questions: Question) -> Protocol:
    return Protocol(
        questions, parse_score, f"score from 0 to {TOP_SCORE}",
        {"response_format": FORMAT, "temperature": 0, "max_tokens": 300}, published=False, longest_side=768,
    )  # fmt: skip


_EDITSCORE = Protocol(
    (Question(EDITED), Question(QUALITY, 0)), lowest_of_two, "list of two scores from 0 to 25",
    {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "seed": 42, "max_tokens": 512},
)  # fmt: skip

_FULFILS = Question(FULFILS, None)
_SAME_SUBJECTS = Question(SAME_SUBJECTS, None, {"scene": _reworded(SAME_SUBJECTS, _TEXTS["in_scene"])})
_OMNICONTEXT = Protocol(
    (_FULFILS, _SAME_SUBJECTS), score_of_ten, "JSON object with a score from 0 to 10", {"max_tokens": 1400},
    jpeg_quality=75, text_first=True, fit=_sixteenths,
)  # fmt: skip

RUBRICS = {
    "identity": _rubric(Question(IDENTITY, None)),
    "prompt": _rubric(Question(PROMPT, 0)),
    "both": _rubric(Question(PROMPT, 0), Question(IDENTITY, None)),
    "editscore": _EDITSCORE,
    "editscore-qwen2.5-vl": replace(_EDITSCORE, label="<img{}>: "),
    "unifiedreward-edit": replace(
        _EDITSCORE,
        questions=(Question(_reworded(EDITED, _UNIFIED)), Question(_reworded(QUALITY, _UNIFIED), 0)),
        fields={"temperature": 0, "max_tokens": 4096},
        jpeg_quality=95,
    ),
    "paco-reward": Protocol(
        (Question(CONSISTENT), Question(FOLLOWS)), yes_of_yes_or_no, "probability of Yes or No",
        {"temperature": 0, "max_completion_tokens": 1, "logprobs": True, "top_logprobs": 20}, jpeg_quality=75,
    ),
    "omnicontext": _OMNICONTEXT,
    "omnicontext-prompt": replace(_OMNICONTEXT, questions=(_FULFILS,)),
    "omnicontext-subjects": replace(_OMNICONTEXT, questions=(_SAME_SUBJECTS,)),
}  # fmt: skip
"""Protocols by name."""
