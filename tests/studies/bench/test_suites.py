"""The tasks of the protocols: which photos are shown, compared and true, on small data and on the real photos."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from customized_grpo.cli.bench import bench as run_bench
from customized_grpo.errors import UserError
from customized_grpo.studies.bench import find_protocol
from customized_grpo.studies.bench.record import read_bench
from customized_grpo.studies.bench.suites import open_suite, prompt_kind, toy_suite
from rewards.tiny import save_clip, save_dino, xverse_clone
from studies.bench.tiny import COLOURS, METRICS, OmniContext, dreambench, dreambench_plus

REAL = Path(__file__).parents[4] / "shared" / "dreambench"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the photos of DreamBench are not beside the repository")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return dreambench(tmp_path / "data")


def entries(tmp_path: Path, *rows: tuple[str, list[str]]) -> Path:
    file = tmp_path / "list.json"
    file.write_text(json.dumps([{"prompt": prompt, "image_paths": paths} for prompt, paths in rows]))
    return file


def test_dreambooth_compares_with_all_photos(data: Path) -> None:
    suite = open_suite(find_protocol("dreambooth"), data, None)
    task = suite.tasks[1]
    assert (task.id, task.prompt, task.kind, task.prompt_kind) == (
        "dog-01",
        "a dog wearing a red hat",
        "live",
        "accessory",
    )
    assert suite.example(task, True).references[0].getpixel((0, 0)) == (200, 120, 40)
    assert [r.getpixel((0, 0))[2] for r in suite.example(task, False).references] == [40, 50, 60]
    first = next(iter(suite.real()))
    assert [r.getpixel((0, 0))[2] for r in first.others[False].references] == [50, 60]  # not with itself
    assert first.others[True] is None  # nothing is left of what was shown


def test_the_papers_protocol_compares_with_the_shown_photo(data: Path) -> None:
    suite = open_suite(find_protocol("customized-grpo"), data, None)
    assert len(suite.example(suite.tasks[0], False).references) == 1
    compared = [photo.others[False] is not None for photo in suite.real()]
    assert compared == [False, True, True] * 3


def test_a_list_fixes_prompts_and_photos(data: Path, tmp_path: Path) -> None:
    file = entries(
        tmp_path, ("a red vase", ["x/dataset/vase/02.png"]), ("a vase in the sea", ["x/dataset/vase/02.png"])
    )
    suite = open_suite(find_protocol("uno"), data, file)
    assert [task.id for task in suite.tasks] == ["vase-00", "vase-01"]
    assert suite.example(suite.tasks[0], True).references[0].getpixel((0, 0)) == (50, 80, 220)
    assert [photo.name for photo in suite.real() if photo.others[False]] == ["vase/00.png", "vase/01.png"]


def test_two_subjects_are_one_image(data: Path, tmp_path: Path) -> None:
    file = entries(tmp_path, ("a dog and a vase in the snow", ["./d/dog/00.png", "./d/vase/01.png"]))
    suite = open_suite(find_protocol("uno-multi"), data, file)
    (task,) = suite.tasks
    assert (task.subject, task.kind) == ("dog+vase", "mixed")
    assert [r.getpixel((0, 0)) for r in suite.example(task, True).references] == [(200, 120, 40), (40, 70, 210)]
    compared = [(photo.name, len(photo.others[False].references)) for photo in suite.real() if photo.others[False]]
    assert compared == [("dog/01.png", 1), ("dog/02.png", 1), ("vase/00.png", 1), ("vase/02.png", 1)]


def test_a_bench_of_two_subjects(data: Path, tmp_path: Path) -> None:
    file = entries(
        tmp_path,
        *[(f"a dog and a vase {n}", ["d/dog/00.png", "d/vase/01.png"]) for n in range(2)],
        *[(f"a can and a vase {n}", ["d/can/00.png", "d/vase/01.png"]) for n in range(2)],
    )
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump({"policy": {"use": "studies.bench.tiny:Policy"}}))
    words = ["uno-multi", f"data={data}", f"prompts={file}", f"metrics={json.dumps(METRICS)}", "num_inference_steps=2"]
    run_bench(words, config=tmp_path / "plain.yaml", output=tmp_path / "out", trust_code=True)
    bench = read_bench(tmp_path / "out")
    assert bench.scores.values.shape == (4, 4, 3)
    assert (
        "UNO, Wu"
        not in (tmp_path / "out" / "report.html")
        .read_text(encoding="utf-8")
        .split("The rules")[0]
        .split("Scores</h2>")[1]
    )  # the published numbers are of one subject


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([("a dog", ["d/wolf/00.png"])], "'d/wolf/00.png' is not among the photos"),
        ([("a dog", ["d/dog/09.png"])], "'d/dog/09.png' is not among the photos"),
        ([("a dog", ["d/dog/00.png", "d/can/00.png"])], "names 2 photos; this protocol shows 1"),
        ([("", ["d/dog/00.png"])], "expected 'prompt' and 'image_paths'"),
        ([], "holds no task"),
    ],
)
def test_a_wrong_list_is_one_sentence(rows: list, sentence: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        open_suite(find_protocol("uno"), data, entries(tmp_path, *rows))


def test_dreambench_plus_is_read(tmp_path: Path) -> None:
    dreambench_plus(tmp_path, (("animal", "00"), ("style", "01")))
    suite = open_suite(find_protocol("dreambench++"), tmp_path, None)
    assert Counter(task.kind for task in suite.tasks) == {"animal": 9, "style": 9}
    assert Counter(task.prompt_kind for task in suite.tasks) == {"photorealistic": 8, "styled": 6, "imaginative": 4}
    assert list(suite.real()) == []
    (tmp_path / "captions" / "style" / "01.txt").unlink()
    with pytest.raises(UserError, match="is the download complete"):
        open_suite(find_protocol("dreambench++"), tmp_path, None)


def test_omnicontext_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("customized_grpo.studies.bench.suites.open_dataset", lambda path: OmniContext())
    suite = open_suite(find_protocol("omnicontext"), tmp_path)
    assert [(task.id, task.kind, task.prompt_kind) for task in suite.tasks] == [
        ("single_object-k0", "single_object", "single"),
        ("multi_character-k1", "multi_character", "multi"),
        ("scene_character_object-k2", "scene_character_object", "scene"),
    ]  # the instruction in Chinese is left out, as in the authors' statistics
    example = suite.example(suite.tasks[2], False)
    assert (example.prompt, example.kind) == ("a dog 2", "scene")  # by which the judge chooses its words
    assert [picture.getpixel((0, 0)) for picture in example.references] == list(COLOURS.values())
    assert list(suite.real()) == []
    assert len(open_suite(find_protocol("omnicontext"), tmp_path, subjects=2).tasks) == 2
    rows = SimpleNamespace(column_names=["key", "prompt"])
    monkeypatch.setattr("customized_grpo.studies.bench.suites.open_dataset", lambda path: rows)
    with pytest.raises(UserError, match="no column instruction, instruction_language, task_type; give OmniContext's"):
        open_suite(find_protocol("omnicontext"), tmp_path)


def test_xversebench_is_read(tmp_path: Path) -> None:
    xverse_clone(tmp_path, [["animal"], ["human", "human", "object"], ["object", "human"]])
    (single,) = open_suite(find_protocol("xversebench"), tmp_path).tasks
    assert (single.id, single.prompt, single.kind, single.prompt_kind) == (
        "single-000", "prompt 0", "one subject", "animal",
    )  # fmt: skip
    suite = open_suite(find_protocol("xversebench-multi"), tmp_path)
    assert [(task.kind, task.prompt_kind) for task in suite.tasks] == [
        ("3 subjects", "human+object"),
        ("2 subjects", "human+object"),
    ]
    example = suite.example(suite.tasks[0], True)
    assert (example.id, example.subject) == ("multi-000", "noun 1 0 and noun 1 1 and noun 1 2")
    assert [picture.getpixel((0, 0))[1] // 100 for picture in example.references] == [0, 1, 2]
    assert list(suite.real()) == []
    (tmp_path / "assets" / "XVerseBench" / "object" / "2_0.jpg").unlink()
    with pytest.raises(UserError, match=r"object/2_0.jpg'; prepare the photos as assets/ReadMe.md of the clone says"):
        open_suite(find_protocol("xversebench-multi"), tmp_path)


def test_the_toy_world_asks_each_creature_several_times() -> None:
    suite = toy_suite(2, 3, seed=1)
    assert [task.subject for task in suite.tasks] == ["creature-000"] * 3 + ["creature-001"] * 3
    assert (
        suite.example(suite.tasks[0], True).references[0].tobytes()
        == suite.example(suite.tasks[2], True).references[0].tobytes()
    )
    assert len(list(suite.real())) == 6


def test_prompts_are_told_apart_by_wording() -> None:
    told = ("a red dog, next to it is a vase", "a cube shaped can", "a cat in a police outfit", "a can on a red rug")
    assert [prompt_kind(p) for p in told] == ["property", "property", "accessory", "recontextualisation"]


@real
@pytest.mark.parametrize("name", ["uno", "uno-multi"])
def test_the_lists_of_the_field_are_complete(name: str) -> None:
    file = REAL / ("protocol_single.json" if name == "uno" else "protocol_multi.json")
    suite = open_suite(find_protocol(name), REAL, file)
    assert len(suite.tasks) == 750
    assert len({task.subject for task in suite.tasks}) == 30
    assert set(Counter(task.subject for task in suite.tasks).values()) == {25}
    kinds = Counter(task.prompt_kind for task in suite.tasks)
    assert kinds["property"] == 150
    if name == "uno":  # 21 objects with 20 places, 9 live subjects with 10 places and 10 accessories
        live = sum(task.kind == "live" for task in suite.tasks) // 25
        assert kinds == {"recontextualisation": 20 * (30 - live) + 10 * live, "accessory": 10 * live, "property": 150}


@pytest.mark.usefixtures("plotted")
def test_a_bench_of_the_toy_world(tmp_path: Path) -> None:
    words = ["toyworld", "subjects=1", "images=1", "num_inference_steps=2"]
    run_bench(words, output=tmp_path / "out")
    bench = read_bench(tmp_path / "out")
    assert bench.scores.values.shape == (1, 4, 5)
    assert np.isfinite(bench.scores.values[:, :, :4]).all()
    assert [score for _, score in bench.real["oracle_subject"]] == pytest.approx([1] * 4, abs=0.2)


@real
@pytest.mark.filterwarnings("ignore:.*longer than the 8 tokens")
def test_a_bench_of_real_photos_with_encoders_of_the_right_kind(tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump({"policy": {"use": "studies.bench.tiny:Policy"}}))
    dino, clip = save_dino(tmp_path / "dino", 1), save_clip(tmp_path / "clip")
    words = ["uno", f"data={REAL}", f"prompts={REAL / 'protocol_single.json'}", "subjects=2", "images=1",
             "num_inference_steps=2", f"metrics.dino.path={dino}", f"metrics.clip_i.path={clip}",
             f"metrics.clip_t.path={clip}"]  # fmt: skip
    run_bench(words, config=tmp_path / "plain.yaml", output=tmp_path / "out", trust_code=True)
    bench = read_bench(tmp_path / "out")
    assert np.isfinite(bench.scores.values[:, :, :3]).all()
    assert np.isnan(bench.scores.values[:, :, 3]).all()  # DreamBench has no masks, and so no backgrounds
    photos = sum(len(list((REAL / "dataset" / name).glob("*.jpg"))) for name in ("backpack", "backpack_dog"))
    assert len(bench.real["dino"]) == photos - 2  # all but the two that are shown
    assert "no reference has a mask" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
