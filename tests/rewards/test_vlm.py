"""The judge against a real HTTP server in a process of its own."""

import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch

from customized_grpo.errors import UserError
from customized_grpo.rewards import RewardUnavailable, VlmJudge
from customized_grpo.rewards.client import request_json
from customized_grpo.rewards.vlm import parse_score
from rewards import tiny

SHADES = torch.tensor([0.0, 61, 130, 190, 250])
"""Red of the pictures; the stand-in's score is red // 60: 0, 1, 2, 3, 4."""


@pytest.fixture(scope="module")
def endpoint():
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "far" / "judge.py")], stdout=subprocess.PIPE
    ) as process:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        process.kill()


@pytest.fixture
def judge(endpoint):
    def make(model="good", rubric="prompt", **settings):
        return VlmJudge(rubric, model=model, url=endpoint, **{"backoff": 0.01, "timeout": 10.0} | settings)

    return make


@pytest.fixture
def pictures(request):
    """Five of them, different in each test: what one test asked must be new to the next."""
    images = torch.zeros(5, 3, 8, 8)
    images[:, 0] = (SHADES / 255).view(5, 1, 1)
    digest = zlib.crc32(request.node.name.encode())
    images[:, 1], images[:, 2] = digest % 256 / 255, digest // 256 % 256 / 255
    return images


@pytest.fixture
def examples():
    return [tiny.example(references=2, subject="dog")] * 5


def counted(endpoint):
    return request_json(endpoint.removesuffix("/v1") + "/state", timeout=5)


@pytest.mark.parametrize("model", ["good", "fenced", "limited", "flaky", "drops", "prose-once"])
@pytest.mark.parametrize("rubric", ["identity", "prompt"])
def test_scores(model, rubric, judge, pictures, examples):
    reward = judge(model, rubric)
    assert reward(pictures, examples).tolist() == [0, 1, 2, 3, 4]
    asked_twice = model in ("limited", "flaky", "drops", "prose-once")
    assert reward.counters["requests"] == (10 if asked_twice else 5)
    assert reward.counters["unparseable"] == (5 if model == "prose-once" else 0)
    assert reward.counters["failed"] == 0


@pytest.mark.parametrize("model", ["prose", "seven", "refusal"])
def test_what_cannot_be_parsed_is_nan_not_zero(model, judge, pictures, examples):
    reward = judge(model, retries=1)
    assert reward(pictures, examples).isnan().all()
    assert reward.counters["unparseable"] == 10


def test_one_dead_request_is_nan_the_others_count(judge, pictures, examples):
    reward = judge("one-fails", retries=1)
    scores = reward(pictures, examples)
    assert scores[0].isnan()
    assert scores[1:].tolist() == [1, 2, 3, 4]
    assert reward.counters["failed"] == 1


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("hang", "no complete answer within 0.5 s"),
        ("not-json", "the answer is not JSON"),
        ("rejects", "HTTP 400: json_schema is not supported"),
        ("unauthorized", "HTTP 401: bad key"),
    ],
)
def test_a_judge_that_stays_dead_stops_the_run(model, reason, judge, pictures, examples):
    start = time.monotonic()
    with pytest.raises(RewardUnavailable, match=reason):
        judge(model, retries=1, timeout=0.5 if model == "hang" else 10.0)(pictures, examples)
    assert time.monotonic() - start < 10


def test_patience_with_rate_limits_ends(judge, pictures, examples):
    with pytest.raises(RewardUnavailable, match="HTTP 429: slow down"):
        judge("limited", patience=0.05)(pictures, examples)


def test_requests_run_at_once_but_no_more_than_said(endpoint, judge, pictures, examples):
    judge(concurrency=3)(pictures, examples)
    assert counted(endpoint)["most_at_once"] > 1
    assert judge(concurrency=1).concurrency == 1


def test_the_same_content_is_asked_once(endpoint, judge, pictures, examples, tmp_path):
    cache = tmp_path / "verdicts.jsonl"
    first = judge(cache=cache)
    twice = first(torch.cat([pictures, pictures]), examples * 2)
    assert twice.tolist() == [0, 1, 2, 3, 4] * 2
    cache.write_text(cache.read_text().rstrip()[:-20])  # killed while writing the last line
    before = counted(endpoint)["requests"]
    again = judge(cache=cache)
    assert again(pictures, examples).tolist() == [0, 1, 2, 3, 4]
    assert counted(endpoint)["requests"] == before + 1
    third = judge(cache=cache)
    assert third(pictures, examples).tolist() == [0, 1, 2, 3, 4]
    assert counted(endpoint)["requests"] == before + 1
    assert (first.counters["cached"], again.counters["cached"], third.counters["cached"]) == (5, 4, 5)
    other_prompt = [tiny.example(prompt="a red hat", references=2)] * 5
    third(pictures, other_prompt)
    assert counted(endpoint)["requests"] == before + 6


def test_tokens_and_cost(judge, pictures, examples):
    reward = judge(prices=(2.0, 10.0))
    reward(pictures, examples)
    assert reward.counters["prompt_tokens"] == 500
    assert reward.counters["completion_tokens"] == 35
    assert reward.counters["cost"] == pytest.approx((500 * 2 + 35 * 10) / 1e6)


def test_what_is_sent(endpoint, judge, pictures, examples, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    reward = judge(rubric="identity", api_key_variable="JUDGE_KEY", longest_side=16)
    reward(pictures[:1], examples[:1])
    last = counted(endpoint)["last"]
    assert last["key"] == "Bearer secret"
    content = last["body"]["messages"][1]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "image_url", "text", "image_url"]
    assert "dog" in content[0]["text"]
    assert examples[0].prompt in content[3]["text"]
    prompt_only = judge(rubric="prompt").request(tiny.picture(), examples[0])["messages"][1]["content"]
    assert [part["type"] for part in prompt_only] == ["text", "image_url"]


def test_fails_early(judge, endpoint):
    with pytest.raises(UserError, match=r"serves no 'goood'. Did you mean 'good'"):
        judge("goood")
    with pytest.raises(UserError, match=r"no rubric 'promt'.* Did you mean 'prompt'"):
        judge(rubric="promt")
    with pytest.raises(UserError, match=r"cannot be used .*ConnectionRefused"):
        VlmJudge(model="good", url="http://127.0.0.1:9/v1")


@pytest.mark.parametrize(
    ("content", "score"),
    [('{"score": 3}', 3), ('{"score": 3.0}', 3), ('{"score": "3"}', None), ('{"score": true}', None), ("[3]", None)],
)
def test_parse_score(content, score):
    assert parse_score({"choices": [{"message": {"content": content}}]}) == score


def test_parse_score_of_nonsense():
    assert [parse_score(answer) for answer in (None, [], {}, {"choices": []}, "text")] == [None] * 5
