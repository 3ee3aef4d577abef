"""What published judges are asked is what their authors ask, and answers are read as they read them."""

import base64
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from customized_grpo.errors import UserError
from customized_grpo.rewards import VlmJudge, vlm
from customized_grpo.rewards.protocols import lowest_of_two, parse_score, yes_of_yes_or_no
from customized_grpo.structures import Example

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
    assert all(picture.size == (900, 900) and message["role"] == "user" for picture in pictures)
    nearest = [max(COLOURS, key=lambda name: dot(COLOURS[name], picture.getpixel((5, 5)))) for picture in pictures]
    fields = {name: value for name, value in body.items() if name not in ("model", "messages")}
    if recorded["fields"].get("do_sample") is False:  # no field of this interface; it means temperature 0
        assert fields.pop("temperature") == 0
        fields["do_sample"] = False
    if "encoding" not in recorded:  # their pictures are not encoded at all
        return {"prompt": prompt, "images": nearest, "fields": fields}
    (encoding,) = {(picture.format, *picture.quantization[0][:4]) for picture in pictures}
    return {"prompt": prompt, "images": nearest, "encoding": list(encoding), "fields": fields}


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
    pictures = {name: Image.new("RGB", (900, 900), colour) for name, colour in COLOURS.items()}
    example = Example("e", record["instruction"], (pictures["source"], pictures["other"]), subject="dog")
    image = torch.zeros(1, 3, 900, 900)
    image[:, 2] = 1
    for case in record["cases"]:
        judge.cache.scores.clear()
        assert judge(image, [example]).item() == pytest.approx(case["score"], rel=1e-6), case
    assert judge.counters["unparseable"] == 0


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


def test_published_prompts_take_no_instructions_and_only_sampled_answers_have_passes():
    with pytest.raises(UserError, match="'editscore' is a published prompt"):
        VlmJudge.check_arguments("editscore", instructions="Be strict.")
    with pytest.raises(UserError, match="'prompt' are not sampled; set passes to 1, not 2"):
        VlmJudge.check_arguments("prompt", passes=2)


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
