"""A vision-language model as judge, behind any OpenAI-compatible endpoint (vLLM, SGLang, a hosted one)."""

import base64
import io
import itertools
import math
import os
import re
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image
from torch import Tensor

from customized_grpo.data.images import png, segmented, to_pil
from customized_grpo.errors import UserError, nearest, printable
from customized_grpo.rewards.client import NoAnswer, attempts, error_text, request_json
from customized_grpo.rewards.contract import RewardUnavailable
from customized_grpo.rewards.protocols import FORMAT, IN_WORDS, RUBRICS, choice_of, content_of
from customized_grpo.rewards.protocols import graded as graded_rubric
from customized_grpo.settings import AtLeastOne
from customized_grpo.store import append, checksum, read_lines
from customized_grpo.structures import Example

Auto = Literal["auto"]


class VlmJudge:
    """A judge that scores by one of our rubrics, or like a published reward; NaN for an image without an answer.

    An answer that cannot be parsed is requested again; the score is NaN if no attempt succeeds, never 0. If no request
    of a call is answered, the judge is considered dead. "auto" is the value that the rubric sets.

    Args:
        rubric: ours, from 0 to 4: "identity" (sees the references, the prompt and the image; changes that the prompt
            asks for do not count), "prompt" (sees the prompt and the image), or "both", the geometric mean of the two,
            each asked by itself. Published, for the model that was trained for it; these see the first reference, the
            prompt and the image: "editscore", from 0 to 10, for the models built on Qwen3-VL, and
            "editscore-qwen2.5-vl" for those on Qwen2.5-VL; "unifiedreward-edit", from 0 to 10; "paco-reward", from 0
            to 1. OmniContext's, which see all references and the prompt, from 0 to 10: "omnicontext-prompt",
            "omnicontext-subjects", and "omnicontext", the geometric mean of the two, each asked by itself.
        model: the name under which the endpoint serves it.
        url: of the endpoint, up to and including /v1.
        api_key_variable: the environment variable that holds the key, if one is needed.
        instructions: your own rubric instead of ours; it sees what the named one sees, and must score from 0 to 4 too.
        graded: score by the expectation over the digits' probabilities, not by the likeliest digit, so that images of
            a group rarely tie. The endpoint must give log-probabilities. Only of our rubrics.
        passes: how often each question is asked, with another seed each time; the scores are averaged. Only of rubrics
            whose answers are sampled.
        segment: paint references white outside their masks, where there is a mask. Only of our rubrics.
        longest_side: images are scaled down to this size before they are sent, in pixels; None does not scale.
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
        graded: bool = False,
        passes: AtLeastOne = 1,
        segment: bool = True,
        longest_side: int | Auto | None = "auto",
        max_tokens: int | Auto | None = "auto",
        max_completion_tokens: int | None = None,
        temperature: float | Auto | None = "auto",
        extra_body: Mapping[str, Any] | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 3,
        backoff: float = 1.0,
        patience: float = 300.0,
        cache: str | Path | None = None,
        prices: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        self.check_arguments(rubric, instructions=instructions, graded=graded, passes=passes)
        self.name, self.model, self.url = rubric, model, url.rstrip("/")
        self.protocol = graded_rubric(RUBRICS[rubric]) if graded else RUBRICS[rubric]
        if instructions:
            question = replace(self.protocol.questions[0], text=instructions)
            self.protocol = replace(self.protocol, questions=(question,))
        self.segment, self.concurrency, self.passes = segment and not self.protocol.published, concurrency, passes
        self.longest_side = self.protocol.longest_side if longest_side == "auto" else longest_side
        self.timeout, self.retries, self.backoff, self.patience = timeout, retries, backoff, patience
        self.prices = prices
        given = {"max_tokens": None if max_completion_tokens else max_tokens, "temperature": temperature}
        given = {name: value for name, value in given.items() if value != "auto"}
        if max_completion_tokens:
            given["max_completion_tokens"] = max_completion_tokens
        self.fields = {**self.protocol.fields, **given, **(extra_body or {})}
        key = os.environ.get(api_key_variable)
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.cache = _Cache(cache)
        self.counters: dict[str, float] = dict.fromkeys(
            ("requests", "cached", "unparseable", "failed", "prompt_tokens", "completion_tokens", "cost"), 0
        )
        """Numbers of requests and failures, and their cost in tokens and money."""
        self.unscored = ""
        """The reason why the last unscored image has no score."""
        self._lock, self._pause_until = threading.Lock(), 0.0
        self._check_endpoint()

    @staticmethod
    def check_arguments(
        rubric: str, *, instructions: str | None = None, graded: bool = False, passes: int = 1, **others: Any
    ) -> None:
        """Raise UserError for a rubric that does not exist, or for a setting that is not of this rubric."""
        if rubric not in RUBRICS:
            raise UserError(f"There is no rubric '{rubric}', only {', '.join(RUBRICS)}.{nearest(rubric, RUBRICS)}")
        protocol = RUBRICS[rubric]
        if graded and protocol.published:
            raise UserError(f"The rubric '{rubric}' is published with its own way to score; remove graded.")
        if instructions and (protocol.published or len(protocol.questions) > 1):
            raise UserError(f"The rubric '{rubric}' has its own text; give instructions to 'identity' or 'prompt'.")
        if passes > 1 and "seed" not in protocol.fields:
            raise UserError(f"The answers of the rubric '{rubric}' are not sampled; set passes to 1, not {passes}.")

    @property
    def where(self) -> str:
        """The endpoint that scores."""
        return self.url

    def __call__(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """Shape (B,), on CPU."""
        errors: list[NoAnswer] = []
        with ThreadPoolExecutor(self.concurrency) as pool:
            bodies = list(pool.map(self.requests, map(to_pil, images.cpu()), examples))
            keys = [[checksum(body) for body in row] for row in bodies]
            pairs = zip(itertools.chain(*keys), itertools.chain(*bodies), strict=True)
            asked = {key: body for key, body in pairs if key not in self.cache}
            verdicts = dict(zip(asked, pool.map(lambda body: self._judge(body, errors), asked.values()), strict=True))
        self.counters["cached"] += sum(map(len, keys)) - len(asked)
        self.cache.add({key: score for key, score in verdicts.items() if score is not None})
        if asked and len(errors) == len(asked):
            raise self._dead(errors[0])
        return torch.tensor([self._score([self.cache.get(key) for key in row]) for row in keys])

    def requests(self, image: Image, example: Example) -> list[dict[str, Any]]:
        """The bodies of the requests that judge one picture: of each pass, one for each question."""
        references = segmented(example) if self.segment else example.references
        bodies: list[dict[str, Any]] = []
        for question in self.protocol.questions:
            if not self.protocol.published and self.fields["response_format"] is not FORMAT:
                question = replace(question, text=f"{question.text}\n{IN_WORDS}")
            messages = self.protocol.messages(question, image, example, references, self._picture)
            body = {"model": self.model, "messages": messages, **self.fields}
            bodies.append({name: value for name, value in body.items() if value is not None})
        if self.passes == 1:
            return bodies
        return [{**body, "seed": body.get("seed", 0) + n} for n in range(self.passes) for body in bodies]

    def _score(self, values: Sequence[float | None]) -> float:
        """The mean over passes of the geometric mean over questions; NaN if an answer is missing."""
        given = [value for value in values if value is not None]
        if len(given) < len(values):
            return math.nan
        count = len(self.protocol.questions)
        passes = [given[start : start + count] for start in range(0, len(given), count)]
        return statistics.fmean(math.prod(one) ** (1 / count) for one in passes)

    def _judge(self, body: Mapping[str, Any], errors: list[NoAnswer]) -> float | None:
        """The score, or None for what could not be parsed or answered; the latter is added to `errors`."""
        failure: NoAnswer | None = None
        for attempt in attempts(self.retries, self.backoff):
            other = {"temperature": 0.5} if body.get("temperature") == 0 else {}
            if "seed" in body:
                other["seed"] = body["seed"] + 1000 * attempt  # the same question gets the same answer
            try:
                answer = self._ask({**body, **other} if attempt else body)
            except NoAnswer as error:
                failure = error
                if error.final or error.status == 429:  # waited for already
                    break
                continue
            failure = None
            if (score := self.protocol.read(answer)) is not None:
                return float(score)
            self._count(unparseable=1)
            self.unscored = f"there is no {self.protocol.expected} in the answer {_excerpt(answer)}"
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
        if self.longest_side is not None and max(picture.size) > self.longest_side:
            picture = picture.copy()
            picture.thumbnail((self.longest_side, self.longest_side))
        if (quality := self.protocol.jpeg_quality) is None:
            kind, data = "png", png(picture)
        else:
            kind, buffer = "jpeg", io.BytesIO()
            picture.convert("RGB").save(buffer, "JPEG", quality=quality)
            data = buffer.getvalue()
        url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}

    def _count(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self.counters[name] += amount


def _check_answer(answer: Any) -> None:
    """Raise the error that some endpoints send with the status 200, beside or instead of an answer."""
    choice = choice_of(answer)
    failed = {"error": choice.get("error")} if choice else answer
    if said := error_text(failed):
        error = failed.get("error")
        code = str(error.get("code") if isinstance(error, dict) else failed.get("code"))
        raise NoAnswer(said, status=int(code) if re.fullmatch("[45][0-9][0-9]", code) else None)


def _excerpt(answer: Any) -> str:
    """The beginning of an answer, for an error."""
    text = f"'{printable(' '.join((content_of(answer) or str(answer)).split()))[:200]}'"
    return f"{text} (cut off at the token limit)" if choice_of(answer).get("finish_reason") == "length" else text


def _tokens(answer: Any, name: str) -> int:
    """A count in the `usage` of an answer; 0 if it is missing or not a sensible number."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    count = usage.get(name) if isinstance(usage, dict) else None
    return int(count) if isinstance(count, (int, float)) and 0 <= count < 1e9 else 0


class _Cache:
    """Verdicts by the digest of the whole request: model, rubric, prompt and pixels. In a file if it has one."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path).expanduser()
        self.scores: dict[str, float] = {}
        if self.path is not None and self.path.exists():
            rows = read_lines(self.path, key=str).rows
            self.scores = {row["key"]: row["score"] for row in rows if type(row.get("score")) in (int, float)}

    def __contains__(self, key: str) -> bool:
        return key in self.scores

    def get(self, key: str) -> float | None:
        return self.scores.get(key)

    def add(self, scores: Mapping[str, float]) -> None:
        self.scores.update(scores)
        if self.path is not None and scores:
            append(self.path, *({"key": key, "score": score} for key, score in scores.items()))
