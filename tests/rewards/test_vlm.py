"""The judge against a real HTTP server in a process of its own."""

import json
import subprocess
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from customized_grpo.errors import UserError
from customized_grpo.rewards import RewardUnavailable, VlmJudge
from customized_grpo.rewards.client import request_json
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
    prompt_only = judge(rubric="prompt").requests(tiny.picture(), examples[0])[0]["messages"][1]["content"]
    assert [part["type"] for part in prompt_only] == ["text", "image_url"]


def test_fails_early(judge, endpoint):
    with pytest.raises(UserError, match=r"serves no 'goood'. Did you mean 'good'"):
        judge("goood")
    with pytest.raises(UserError, match=r"no rubric 'promt'.* Did you mean 'prompt'"):
        judge(rubric="promt")
    with pytest.raises(UserError, match=r"cannot be used .*ConnectionRefused"):
        VlmJudge(model="good", url="http://127.0.0.1:9/v1")


VERDICT = '{"findings": "a {hat}", "score": 3}'


def completion(content, **more):
    return {"choices": [{"message": {"content": content}}], **more}


@pytest.fixture
def replies():
    """Makes a judge whose endpoint gives one answer to everything; the bodies that it was sent are in `sent`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send({"data": [{"id": "m"}]})

        def do_POST(self):
            make.sent.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send(make.answer)

        def send(self, answer):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *args):
            pass

    def make(answer, **settings):
        make.answer, make.sent = answer, []
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        return VlmJudge(model="m", url=url, **{"backoff": 0, "retries": 1} | settings)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield make
        server.shutdown()


@pytest.mark.parametrize(
    ("answer", "reason", "requests"),
    [
        ({"error": {"message": "no credits", "code": 402}}, "no credits", 5),
        ({"error": {"message": "no credits", "code": "insufficient_quota"}}, "no credits", 10),
        ({"error": "no credits"}, "no credits", 10),
        ({"object": "error", "message": "no credits", "code": 400}, "no credits", 5),
        ({"detail": "no \x1b[31mcredits"}, r"no \\x1b\[31mcredits", 10),
        ({"choices": [{"error": {"message": "no credits", "code": 502}}]}, "no credits", 10),
        ({"choices": [{"error": {"code": "9" * 300}}]}, "code.*999", 10),
    ],
)
def test_an_error_with_status_200_is_the_failure_of_the_server(answer, reason, requests, replies, pictures, examples):
    with pytest.raises(RewardUnavailable, match=reason):
        replies(answer)(pictures, examples)
    assert len(replies.sent) == requests


@pytest.mark.parametrize(
    "usage",
    [
        None, [], "much", 7, {}, {"prompt_tokens": None}, {"prompt_tokens": "many"}, {"prompt_tokens": [1]},
        {"prompt_tokens": -5}, {"prompt_tokens": float("nan")}, {"prompt_tokens": 1e999}, {"prompt_tokens": 10**400},
    ],
)  # fmt: skip
def test_odd_usage_does_not_matter(usage, replies, pictures, examples):
    judge = replies(completion(VERDICT, usage=usage), prices=(1.0, 1.0))
    assert judge(pictures, examples).tolist() == [3] * 5
    assert judge.counters["prompt_tokens"] == judge.counters["cost"] == 0


def test_fields_of_the_request_are_settings(replies, pictures, examples):
    def sent(**settings):
        replies(completion("?"), **settings)(pictures[:1], examples[:1])
        return [{k: v for k, v in body.items() if k not in ("model", "messages")} for body in replies.sent]

    default = sent()[0]
    assert default.keys() == {"response_format", "temperature", "max_tokens"}
    assert (default["temperature"], default["max_tokens"]) == (0, 300)
    assert [body["temperature"] for body in sent()] == [0, 0.5]
    reasoning = sent(max_completion_tokens=2000, temperature=None, extra_body={"seed": 1, "response_format": None})
    assert reasoning == [{"max_completion_tokens": 2000, "seed": seed} for seed in (1, 1001)]
    assert [body["temperature"] for body in sent(temperature=0.7, max_tokens=None)] == [0.7, 0.7]
    assert "max_tokens" not in sent(max_tokens=None)[0]
    sent(extra_body={"response_format": None})
    assert '"score": 0 to 4' in replies.sent[0]["messages"][0]["content"]
    sent()
    assert "JSON" not in replies.sent[0]["messages"][0]["content"]


def test_the_judge_says_why_nothing_was_scored(replies, pictures, examples):
    judge = replies({"choices": [{"message": {"content": "I think\x1b[0m that"}, "finish_reason": "length"}]})
    assert judge(pictures, examples).isnan().all()
    assert (
        judge.unscored
        == "there is no score from 0 to 4 in the answer 'I think\\x1b[0m that' (cut off at the token limit)"
    )
