"""A vision-language model as judge, behind any OpenAI-compatible endpoint (vLLM, SGLang, a hosted one)."""

import base64
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from customized_grpo.data.images import png, segmented, to_pil
from customized_grpo.errors import UserError, nearest, printable
from customized_grpo.rewards.client import NoAnswer, attempts, error_text, request_json
from customized_grpo.rewards.contract import RewardUnavailable
from customized_grpo.store import append, read_lines
from customized_grpo.structures import Example

TOP_SCORE = 4
MAX_CHARACTERS = 20_000
"""Of the end of an answer, in which the score is looked for."""

IDENTITY = """\
You compare a generated picture with reference pictures of one subject. Judge one thing only: is the subject of the
generated picture the very same individual or object, not merely one of its kind?
Go through shape and proportions, colours and where they are, surface, pattern and markings, and distinctive parts such
as a face, a logo or lettering. Pose, viewpoint, lighting, background, clothes and art style may differ: do not count
them, and give no credit for copying them. If the instruction asks for a changed colour or material of the subject, do
not count that change either.
4: the same subject; no difference in what makes it recognisable.
3: the same subject, with small differences that one has to look for.
2: clearly alike, but one distinctive trait is wrong or missing.
1: of the same kind, little more.
0: another subject, or none to be seen, or too damaged to tell."""

PROMPT = """\
You check whether a picture shows what an instruction asks for. Take the instruction apart: the subject's kind, its
attributes, what it wears or does, other objects and how many, where they are, the place, the style. Judge only what the
instruction says; beauty and what it leaves open do not matter. A thing that can hardly be seen counts as half shown.
4: everything asked for is there and right.
3: all that matters is right; one minor detail is off.
2: the main thing is right, but something explicitly asked for is missing or wrong.
1: only the kind of subject, or only the place, is right.
0: the picture has nothing to do with the instruction, or cannot be made out."""

_THOUGHT, _THINKING = (
    re.compile(rf"[<\[◁]{slash}(?:think|thinking|thought|reasoning)[>\]▷]", re.IGNORECASE) for slash in ("/", "")
)

RUBRICS = {"identity": IDENTITY, "prompt": PROMPT}

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


class VlmJudge:
    """A judge that scores from 0 to 4 by a rubric; NaN for an image without a valid answer.

    An answer that cannot be parsed is requested again; the score is NaN if no attempt succeeds, never 0. If no request
    of a call is answered, the judge counts as dead.

    Args:
        rubric: "identity" (sees the references and the image) or "prompt" (sees the prompt and the image).
        model: the name under which the endpoint serves it.
        url: of the endpoint, up to and including /v1.
        api_key_variable: the environment variable that holds the key, if one is needed.
        instructions: your own rubric instead; it sees what the named one sees, and must score from 0 to 4 too.
        segment: paint references white outside their masks, where there is a mask.
        longest_side: images are scaled down to this size before they are sent, in pixels.
        max_tokens: of an answer, thinking included; None does not send it.
        max_completion_tokens: sent instead of `max_tokens`, for endpoints that want this name.
        temperature: of the first attempt; None does not send it. An answer at 0 that cannot be parsed is requested
            again at 0.5.
        extra_body: fields to add to the request or to replace in it; null removes a field.
        concurrency: requests in flight at once.
        timeout: seconds that a request may take.
        retries: of a request that failed or whose answer could not be parsed.
        backoff: seconds before the first retry; doubles with each.
        patience: seconds in all that one image may wait on rate limits (429, or 503 with Retry-After).
        cache: a JSONL file to which verdicts are appended, and from which they are read again, by content.
        prices: of a million prompt tokens and a million completion tokens, to count the cost in your currency.

    Raises:
        UserError: if the endpoint cannot be reached, refuses the key, or does not serve the model.
        RewardUnavailable: (when called) if it stays dead.
    """

    RUNTIME = (
        "url", "api_key_variable", "concurrency", "timeout", "retries", "backoff", "patience", "cache", "prices",
    )  # fmt: skip

    def __init__(
        self,
        rubric: str = "prompt",
        *,
        model: str,
        url: str = "http://127.0.0.1:8000/v1",
        api_key_variable: str = "OPENAI_API_KEY",
        instructions: str | None = None,
        segment: bool = True,
        longest_side: int = 768,
        max_tokens: int | None = 300,
        max_completion_tokens: int | None = None,
        temperature: float | None = 0,
        extra_body: Mapping[str, Any] | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 3,
        backoff: float = 1.0,
        patience: float = 300.0,
        cache: str | Path | None = None,
        prices: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        self.check_arguments(rubric)
        self.name, self.model, self.url = rubric, model, url.rstrip("/")
        self.instructions = instructions or RUBRICS[rubric]
        self.segment, self.longest_side, self.concurrency = segment, longest_side, concurrency
        self.timeout, self.retries, self.backoff, self.patience = timeout, retries, backoff, patience
        self.prices = prices
        limits = (
            {"max_completion_tokens": max_completion_tokens} if max_completion_tokens else {"max_tokens": max_tokens}
        )
        self.fields = {"response_format": FORMAT, "temperature": temperature, **limits, **(extra_body or {})}
        key = os.environ.get(api_key_variable)
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.cache = _Cache(cache)
        self.counters: dict[str, float] = dict.fromkeys(
            ("requests", "cached", "unparseable", "failed", "prompt_tokens", "completion_tokens", "cost"), 0
        )
        """What was asked, what it cost in tokens and money, and what came to nothing."""
        self.unscored = ""
        """Why the last image without a score has none."""
        self._lock, self._pause_until = threading.Lock(), 0.0
        self._check_endpoint()

    @staticmethod
    def check_arguments(rubric: str, **others: Any) -> None:
        """Raise UserError for a rubric that does not exist."""
        if rubric not in RUBRICS:
            raise UserError(f"There is no rubric '{rubric}', only {' and '.join(RUBRICS)}.{nearest(rubric, RUBRICS)}")

    @property
    def where(self) -> str:
        """The endpoint that scores."""
        return self.url

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """Shape (B,), on CPU."""
        errors: list[NoAnswer] = []
        with ThreadPoolExecutor(self.concurrency) as pool:
            bodies = list(pool.map(self.request, map(to_pil, images.cpu()), examples))
            keys = [_digest(body) for body in bodies]
            asked = {key: body for key, body in zip(keys, bodies, strict=True) if key not in self.cache}
            verdicts = dict(zip(asked, pool.map(lambda body: self._judge(body, errors), asked.values()), strict=True))
        self.counters["cached"] += len(keys) - len(asked)
        self.cache.add({key: score for key, score in verdicts.items() if score is not None})
        if asked and len(errors) == len(asked):
            raise self._dead(errors[0])
        scores = [self.cache.get(key) for key in keys]
        return torch.tensor([float("nan") if score is None else float(score) for score in scores])

    def request(self, image: Image, example: Example) -> dict[str, Any]:
        """The body of the request that judges one picture."""
        content: list[dict[str, Any]] = []
        if self.name == "identity":
            content.append(_text(f"The subject{f', a {example.subject}' if example.subject else ''}, in reference:"))
            references = segmented(example) if self.segment else example.references
            content += [self._picture(reference) for reference in references]
        content += [_text(f"The instruction: {example.prompt}\nThe generated picture:"), self._picture(image)]
        asked = self.instructions if self.fields["response_format"] is FORMAT else f"{self.instructions}\n{IN_WORDS}"
        messages = [{"role": "system", "content": asked}, {"role": "user", "content": content}]
        body = {"model": self.model, "messages": messages, **self.fields}
        return {name: value for name, value in body.items() if value is not None}

    def _judge(self, body: Mapping[str, Any], errors: list[NoAnswer]) -> int | None:
        """The score, or None for what could not be parsed or answered; the latter is added to `errors`."""
        failure: NoAnswer | None = None
        for attempt in attempts(self.retries, self.backoff):
            again = attempt > 0 and body.get("temperature") == 0  # at 0 the same question gets the same answer
            try:
                answer = self._ask({**body, "temperature": 0.5} if again else body)
            except NoAnswer as error:
                failure = error
                if error.final or error.status == 429:  # waited for already
                    break
                continue
            failure = None
            if (score := parse_score(answer)) is not None:
                return score
            self._count(unparseable=1)
            self.unscored = f"there is no score from 0 to {TOP_SCORE} in the answer {_excerpt(answer)}"
        if failure is not None:
            self.unscored = str(failure)
            errors.append(failure)
            self._count(failed=1)
        return None

    def _ask(self, body: Mapping[str, Any]) -> Any:
        """One answer, however often the endpoint asks to wait."""
        deadline, waits = time.monotonic() + self.patience, 0
        while True:
            time.sleep(max(0.0, self._pause_until - time.monotonic()))
            self._count(requests=1)
            try:
                answer = request_json(f"{self.url}/chat/completions", body, timeout=self.timeout, headers=self.headers)
                _check_answer(answer)
            except NoAnswer as error:
                limited = error.status == 429 or (error.status == 503 and error.retry_after is not None)
                pause = self.backoff * 2**waits if error.retry_after is None else error.retry_after
                if not limited or time.monotonic() + pause > deadline:
                    raise
                waits += 1
                self._pause_until = max(self._pause_until, time.monotonic() + pause)  # for all threads
                continue
            tokens = [_tokens(answer, name) for name in ("prompt_tokens", "completion_tokens")]
            cost = sum(count * price for count, price in zip(tokens, self.prices, strict=True)) / 1e6
            self._count(prompt_tokens=tokens[0], completion_tokens=tokens[1], cost=cost)
            return answer

    def _check_endpoint(self) -> None:
        try:
            listed = request_json(f"{self.url}/models", timeout=10.0, headers=self.headers)
            _check_answer(listed)
        except NoAnswer as error:
            if error.status in (404, 405):  # not every endpoint lists its models
                return
            raise UserError(f"The judge at {self.url} cannot be used ({error}); check url, server and key.") from None
        models = listed.get("data") if isinstance(listed, dict) else None
        entries = models if isinstance(models, list) else []
        known = [str(entry.get("id")) for entry in entries if isinstance(entry, dict)]
        if known and self.model not in known:
            raise UserError(f"The judge at {self.url} serves no '{self.model}'.{nearest(self.model, known)}")

    def _dead(self, error: NoAnswer) -> RewardUnavailable:
        return RewardUnavailable(
            f"The judge '{self.model}' at {self.url} answered none of the requests ({error}); "
            f"check that it runs and accepts images and JSON schemas, then resume the run."
        )

    def _picture(self, picture: Image) -> dict[str, Any]:
        if max(picture.size) > self.longest_side:
            picture = picture.copy()
            picture.thumbnail((self.longest_side, self.longest_side))
        url = f"data:image/png;base64,{base64.b64encode(png(picture)).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}

    def _count(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self.counters[name] += amount


def parse_score(answer: Any) -> int | None:
    """The score in a chat completion, or None if there is none from 0 to 4.

    It is taken from the last JSON object with a score, after the model's thinking; the text around it is ignored.
    """
    text = _THOUGHT.split(_content(answer))[-1]
    text = _THINKING.split(text)[0][-MAX_CHARACTERS:]  # thinking that was cut off holds no verdict
    decoder = json.JSONDecoder()
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


def _choice(answer: Any) -> Mapping[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else {}


def _content(answer: Any) -> str:
    """The text of a chat completion, which some endpoints send in parts; empty if there is none."""
    message = _choice(answer).get("message")
    content = message.get("content") if isinstance(message, dict) else None
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "".join(text for text in texts if isinstance(text, str))


def _check_answer(answer: Any) -> None:
    """Raise the error that some endpoints send with the status 200, beside or instead of an answer."""
    choice = _choice(answer)
    failed = {"error": choice.get("error")} if choice else answer
    if said := error_text(failed):
        error = failed.get("error")
        code = str(error.get("code") if isinstance(error, dict) else failed.get("code"))
        raise NoAnswer(said, status=int(code) if re.fullmatch("[45][0-9][0-9]", code) else None)


def _excerpt(answer: Any) -> str:
    """The beginning of an answer, for an error."""
    text = f"'{printable(' '.join((_content(answer) or str(answer)).split()))[:200]}'"
    return f"{text} (cut off at the token limit)" if _choice(answer).get("finish_reason") == "length" else text


def _tokens(answer: Any, name: str) -> int:
    """A count in the `usage` of an answer; 0 if it is missing or not a sensible number."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    count = usage.get(name) if isinstance(usage, dict) else None
    return int(count) if isinstance(count, (int, float)) and 0 <= count < 1e9 else 0


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class _Cache:
    """Verdicts by the digest of the whole request: model, rubric, prompt and pixels. In a file if it has one."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path).expanduser()
        self.scores: dict[str, int] = {}
        if self.path is not None and self.path.exists():
            self.scores = {row["key"]: row["score"] for row in read_lines(self.path, key=str, score=int).rows}

    def __contains__(self, key: str) -> bool:
        return key in self.scores

    def get(self, key: str) -> int | None:
        return self.scores.get(key)

    def add(self, scores: Mapping[str, int]) -> None:
        self.scores.update(scores)
        if self.path is not None and scores:
            append(self.path, *({"key": key, "score": score} for key, score in scores.items()))
