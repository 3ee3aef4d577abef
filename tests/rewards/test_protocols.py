"""What published judges are asked is what their authors ask, and answers are read as they read them."""

import base64
import io
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from customized_grpo.errors import UserError
from customized_grpo.rewards import VlmJudge, vlm
from customized_grpo.rewards.protocols import (
    IDENTITY,
    TOP_SCORE,
    expected_score,
    lowest_of_two,
    parse_score,
    score_of_ten,
    yes_of_yes_or_no,
)
from customized_grpo.structures import Example
from rewards import tiny

PARITY = [json.loads(path.read_text(encoding="utf-8")) for path in (Path(__file__).parent / "parity").glob("*.json")]
RECORDS = {record["rubric"]: record for record in PARITY if "rubric" in record}
"""By rubric, what the authors' code asked and made of answers. Each file names the repository and the commit."""

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
TURN = SYSTEM + "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
"""What the chat template of Qwen2.5-VL makes of the parts of one message."""
VISION = "<|vision_start|><|image_pad|><|vision_end|>"
COLOURS = {"source": (255, 0, 0), "other": (0, 255, 0), "edited": (0, 0, 255)}

VERDICT = '{"findings": "a {hat}", "score": 3}'


def completion(content, **more):
    return {"choices": [{"message": {"content": content}}], **more}


def seen(body, recorded):
    """A request in the form of the record."""
    (message,) = body["messages"]
    parts = [part.get("text", "<image>") for part in message["content"]]
    prompt = parts
    if isinstance(recorded["prompt"], str):
        prompt = TURN.format("".join(VISION if part == "<image>" else part for part in parts))
    urls = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
    sizes = [list(picture.size) for picture in pictures]
    assert message["role"] == "user"
    assert "sizes" in recorded or sizes == [[900, 900]] * len(pictures)
    nearest = [max(COLOURS, key=lambda name: dot(COLOURS[name], picture.getpixel((5, 5)))) for picture in pictures]
    fields = {name: value for name, value in body.items() if name not in ("model", "messages")}
    if recorded["fields"].get("do_sample") is False:  # no field of this interface; it means temperature 0
        assert fields.pop("temperature") == 0
        fields["do_sample"] = False
    if "encoding" not in recorded:  # their pictures are not encoded at all
        return {"prompt": prompt, "images": nearest, "fields": fields}
    (encoding,) = {(picture.format, *picture.quantization[0][:4]) for picture in pictures}
    resized = {"sizes": sizes} if "sizes" in recorded else {}
    return {"prompt": prompt, "images": nearest, **resized, "encoding": list(encoding), "fields": fields}


def dot(one, other):
    return sum(a * b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("rubric", RECORDS)
def test_it_asks_and_scores_as_the_authors_do(rubric, monkeypatch):
    record = RECORDS[rubric]
    case = {}

    def answer(url, body=None, **_):
        if body is None:
            return {"data": []}
        asked = [recorded for recorded in record["asked"] if seen(body, recorded) == recorded]
        assert len(asked) == 1, seen(body, record["asked"][0])
        text = case["answers"][record["asked"].index(asked[0])]
        return text if isinstance(text, dict) else completion(text)

    monkeypatch.setattr(vlm, "request_json", answer)
    judge = VlmJudge(rubric, model="m", passes=record.get("passes", 1), concurrency=2)
    size = tuple(record.get("references", (900, 900)))
    pictures = tuple(Image.new("RGB", size, COLOURS[name]) for name in ("source", "other"))
    image = torch.zeros(1, 3, 900, 900)
    image[:, 2] = 1
    for case in record["cases"]:
        judge.cache.scores.clear()
        example = Example("e", record["instruction"], pictures, subject="dog", kind=case.get("kind", ""))
        assert judge(image, [example]).item() == pytest.approx(case["score"], rel=1e-6), case
    assert judge.counters["unparseable"] == 0


@pytest.mark.parametrize(("rubric", "score"), [("omnicontext-prompt", "pf"), ("omnicontext-subjects", "sc")])
def test_omnicontexts_two_scores_are_rubrics_too(rubric, score, monkeypatch):
    record = RECORDS["omnicontext"]
    monkeypatch.setitem(RECORDS, rubric, {**record, "cases": [{**c, "score": c[score]} for c in record["cases"][:2]]})
    test_it_asks_and_scores_as_the_authors_do(rubric, monkeypatch)


@pytest.mark.parametrize(("content", "score"), RECORDS["omnicontext"]["parsed"])
def test_omnicontexts_answers_are_read_as_its_authors_read_them(content, score):
    assert score_of_ten(completion(content)) == score


@pytest.mark.parametrize(
    "content",
    ["", "It is good.", '{"score": 20}', '{"score": [20]}', '{"score": [20, 26]}', '{"score": [-1, 5]}', "[20, 20]",
     '{"score": [1, 2, 3]}', '<think>{"score": [20, 20]}'],
)  # fmt: skip
def test_where_their_scorer_guesses_or_fails_there_is_no_score(content):
    assert lowest_of_two(completion(content)) is None


@pytest.mark.parametrize("logprobs", [None, {}, {"content": []}, {"content": [{"token": "Yes"}]}, {"content": "Yes"}])
def test_without_the_probabilities_of_yes_or_no_there_is_no_score(logprobs):
    assert yes_of_yes_or_no({"choices": [{"message": {"content": "Yes"}, "logprobs": logprobs}]}) is None
    neither = {"content": [{"token": "It", "top_logprobs": [{"token": "It", "logprob": -0.1}]}]}
    assert yes_of_yes_or_no({"choices": [{"logprobs": neither}]}) is None


def test_settings_of_other_rubrics_are_refused():
    with pytest.raises(UserError, match="'editscore' has its own text"):
        VlmJudge.check_arguments("editscore", instructions="Be strict.")
    with pytest.raises(UserError, match="'both' has its own text"):
        VlmJudge.check_arguments("both", instructions="Be strict.")
    with pytest.raises(UserError, match="'paco-reward' is published with its own way to score"):
        VlmJudge.check_arguments("paco-reward", graded=True)
    with pytest.raises(UserError, match="'prompt' are not sampled; set passes to 1, not 2"):
        VlmJudge.check_arguments("prompt", passes=2)


def likely(*tokens):
    """A completion of these tokens, each a string or a mapping of the likeliest ones, the first of which was taken."""
    places = [{token: 1.0} if isinstance(token, str) else token for token in tokens]
    content = [
        {"token": next(iter(place)), "top_logprobs": [{"token": t, "logprob": math.log(p)} for t, p in place.items()]}
        for place in places
    ]
    text = "".join(place["token"] for place in content)
    return {"choices": [{"message": {"content": text}, "logprobs": {"content": content}}]}


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (['{"score": ', {"3": 0.5, "2": 0.25, "4": 0.125, "5": 0.1}, "}"], (1.5 + 0.5 + 0.5) / 0.875),
        (['{"', "score", '":', {" 1": 0.6, " 0": 0.3, "4": 0.1}, "}"], 0.6 / 0.9),  # the blank belongs to the digit
        (['{"score":', " ", {"3}": 0.5, "3": 0.25, "1": 0.25}], 0.75 * 3 + 0.25),
        (['<think>{"score": ', {"4": 1.0}, '}</think>{"score": ', {"0": 0.75, "2": 0.25}, "}"], 0.5),
        (['{"findings": "a 4", "score": "', {"2": 0.5, "3": 0.5}, '"}'], 2.5),
        (["I think ", {"3": 1.0}], None),
        (['{"score": ', {"7": 1.0}, "}"], None),
    ],
)
def test_the_graded_score_is_the_expectation_over_its_digits(tokens, expected):
    assert expected_score(likely(*tokens)) == (expected if expected is None else pytest.approx(expected))


def test_without_log_probabilities_there_is_no_graded_score():
    assert parse_score(completion('{"score": 3}')) == 3
    assert expected_score(completion('{"score": 3}')) is None


def test_both_is_the_geometric_mean_of_following_and_identity(monkeypatch):
    sent = []

    def answer(url, body=None, **_):
        if body is None:
            return {"data": []}
        sent.append(body)
        identity = body["messages"][0]["content"] == IDENTITY
        return likely('{"score": ', {"1": 0.5, "0": 0.5} if identity else {"3": 0.5, "4": 0.25, "2": 0.25}, "}")

    monkeypatch.setattr(vlm, "request_json", answer)
    judge = VlmJudge("both", model="m", graded=True)
    example = tiny.example(references=2)
    assert judge(torch.zeros(1, 3, 8, 8), [example]).item() == pytest.approx((0.5 * 3) ** 0.5)
    assert [len(body["messages"][1]["content"]) for body in sent] in ([2, 5], [5, 2])
    assert all(body["logprobs"] and body["top_logprobs"] >= TOP_SCORE + 1 for body in sent)


@pytest.mark.parametrize(
    "content",
    [
        '{"score": 3}', '{"score": 3.0}', '{"score": "3"}', '{"score": " 3.0 "}', '{"score": "3/4"}', '{"Score": 3}',
        f"```json\n{VERDICT}\n```", f"~~~\n{VERDICT}\n~~~", f"```JSON5 {VERDICT}```", f"Here: {VERDICT}. Bye!",
        f'<think>Perhaps {{"score": 1}}?</think>\n{VERDICT}', f'Perhaps {{"score": 1}}?\n</think>\n\n{VERDICT}',
        f"◁think▷hm◁/think▷{VERDICT}", f"<Reasoning>hm</Reasoning>{VERDICT}", f"<|begin|>{VERDICT}<|end|>",
        f'First I thought {{"score": 1}}, but no: {VERDICT}', f'{{"verdict": {VERDICT}}}', f"[{VERDICT}]",
        '{"score": 3, "parts": {"score": 1}}', f"{{broken {VERDICT}", "[" * 5000 + VERDICT,
        [{"type": "text", "text": VERDICT}], [{"type": "thinking", "thinking": []}, {"type": "text", "text": VERDICT}],
        [{"type": "text", "text": VERDICT[:9]}, {"type": "text", "text": VERDICT[9:]}], [VERDICT],
    ],
)  # fmt: skip
def test_a_score_is_found_in(content):
    assert parse_score(completion(content)) == 3


@pytest.mark.parametrize(
    "content",
    [
        None, "", 3, {}, [], [3, None, {}], "[3]", "It is a 3.", '{"score": true}', '{"score": 7}', '{"score": -1}',
        '{"score": 2.5}', '{"score": "high"}', '{"score": "7"}', '{"score": NaN}', '{"score": 1e999}', '{"score": [3]}',
        '{"score": ' + "9" * 5000 + "}", '{"score": 3', f"<think>I lean to {VERDICT}", '{"a":' * 3000, "{" * 10**6,
    ],
)  # fmt: skip
def test_no_score_is_found_in(content):
    assert parse_score(completion(content)) is None


def test_parse_score_of_nonsense():
    answers = (
        None,
        [],
        {},
        {"choices": []},
        {"choices": {}},
        {"choices": [3]},
        {"choices": [{"message": 3}]},
        "text",
        7,
    )
    assert [parse_score(answer) for answer in answers] == [None] * len(answers)
