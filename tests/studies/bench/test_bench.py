"""A whole bench on a DreamBench in small: kill and resume, parts, pairs, alarms, bad input."""

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from customized_grpo.cli.bench import bench, read_settings
from customized_grpo.config import Config, load_config
from customized_grpo.errors import UserError
from customized_grpo.policies.guidance import describe_guidance
from customized_grpo.settings import Role, Spec, recipes
from customized_grpo.settings.build import check_spec
from customized_grpo.settings.identity import declared_roles
from customized_grpo.settings.parse import describe_settings, parse_config
from customized_grpo.studies.bench import PROTOCOLS, Bench, BenchFolder, BenchSettings, make_plan, read_bench
from customized_grpo.studies.bench.findings import (
    above_real,
    compared,
    copying,
    kinds,
    levels,
    paired,
    published,
    real_levels,
)
from customized_grpo.studies.bench.record import write_table
from customized_grpo.studies.bench.report import columns, differences, headline, publications, scores
from studies.bench.tiny import COLOURS, METRICS, dreambench

RECIPES = recipes.RECIPES / "bench"
JOBS = 7 * 2  # a dog's three prompts and two each for vase and can, two images each


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    dreambench(folder / "data")
    for name, policy in {"plain": "Policy", "paste": "Paste"}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"policy": {"use": f"studies.bench.tiny:{policy}"}}))
    bench = {"protocol": "dreambooth", "data": str(folder / "data"), "metrics": METRICS, "images": 2, "batch": 3,
             "num_inference_steps": 3, "config": str(folder / "plain.yaml")}  # fmt: skip
    (folder / "bench.yaml").write_text(yaml.safe_dump(bench))
    return folder


def run(place: Path, output: Path, *words: str, **options) -> Bench:
    bench([str(place / "bench.yaml"), *words], output=output, trust_code=True, **options)
    return read_bench(output)


@pytest.fixture(scope="module")
def plain(place: Path) -> Bench:
    return run(place, place / "plain")


def test_everything_is_drawn_scored_and_reported(plain: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plain.scores.values.shape == (2, 7, 3)
    assert np.isfinite(plain.scores.values[:, :, :2]).all()
    assert len(list(plain.folder.images.rglob("*.png"))) == JOBS
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with write_table(plain).open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == JOBS
    assert float(table[0]["dino"]) == plain.scores.values[0, 0, 0]
    assert (plain.folder.path / table[0]["image"]).is_file()
    page = (plain.folder.path / "report.html").read_text(encoding="utf-8")
    for text in ("the protocol has 30", "UNO, Wu et al. 2025", "Customized-GRPO", "real images", "2 images each"):
        assert text in page


def test_scores_are_a_parquet_file_where_pyarrow_is(plain: Bench) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    file = write_table(plain)
    assert file.name == "scores.parquet"
    table = parquet.read_table(file).to_pylist()
    assert [row["dino"] for row in table] == plain.scores.column("dino").T.flatten().tolist()
    assert table[0]["task"] == "dog-00"


def test_the_same_command_does_nothing_twice(place: Path, plain: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in plain.folder.images.rglob("*.png")}
    monkeypatch.setenv("BENCH_DIES_AFTER", "0")  # the policy would kill us
    again = run(place, place / "plain")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    np.testing.assert_array_equal(again.scores.values, plain.scores.values)


def test_a_killed_bench_goes_on_to_the_same_numbers(place: Path, plain: Bench) -> None:
    output = place / "killed"
    words = [sys.executable, "-m", "customized_grpo", "bench", str(place / "bench.yaml"), "--output", str(output)]
    places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env={**environment, "BENCH_DIES_AFTER": "2"}, capture_output=True, check=False)
    assert done.returncode == -9
    drawn = {path: path.stat().st_mtime_ns for path in (output / "images").rglob("*.png")}
    assert 0 < len(drawn) < JOBS

    again = run(place, output)
    assert {path: path.stat().st_mtime_ns for path in drawn} == drawn
    np.testing.assert_array_equal(again.scores.values, plain.scores.values)


def test_a_line_cut_short_is_scored_again(place: Path, plain: Bench) -> None:
    run(place, place / "cut")
    lines = place / "cut" / "scores" / "dino.0.jsonl"
    lines.write_text(lines.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    with pytest.raises(UserError, match="1 of 14 images lack dino"):
        read_bench(place / "cut")
    np.testing.assert_array_equal(run(place, place / "cut").scores.values, plain.scores.values)


def test_parts_make_a_whole(place: Path, plain: Bench) -> None:
    words = [str(place / "bench.yaml")]
    bench(words, output=place / "parts", part="2/2")
    assert not (place / "parts" / "report.html").exists()
    bench(words, output=place / "parts", part="1/2")
    np.testing.assert_array_equal(read_bench(place / "parts").scores.values, plain.scores.values)


def test_real_images_are_not_compared_with_themselves(plain: Bench) -> None:
    scores = [score for subject, score in plain.real["dino"] if subject == "dog"]
    # photos are 10 grey levels apart: mean distance to the others 15, 10 and 15
    np.testing.assert_allclose(scores, [1 - 15 / 255, 1 - 10 / 255, 1 - 15 / 255], atol=1e-6)
    assert real_levels(plain)["dino"].value == pytest.approx(1 - 40 / 3 / 255, abs=1e-6)
    assert plain.real["clip_t"] == ()  # nobody asked anything of a photo


def test_pasting_the_reference_raises_the_alarm(place: Path, plain: Bench) -> None:
    paste = run(place, place / "paste", f"config={place / 'paste.yaml'}")
    difference, share = above_real(paste, "dino")
    # (0 + 10 + 20) / 3 grey levels from the photos, the shown one among them, where true photos are 13.3 apart
    assert difference.value == pytest.approx((40 / 3 - 10) / 255, abs=2e-3)
    assert share == 1
    serious = [remark.text for remark in copying(paste) if remark.serious]
    assert any(text.startswith("copy-paste? DINO") for text in serious)
    assert any("100% of the background" in text for text in serious)
    assert not [remark for remark in copying(plain) if remark.serious]


def test_kinds_are_told_apart(plain: Bench) -> None:
    groups = dict(kinds(plain))
    assert {title: sum(tasks) for title, tasks in groups.items()} == {
        "live": 3, "object": 4, "recontextualisation": 3, "accessory": 1, "property": 3,
    }  # fmt: skip
    dog = [task.subject == "dog" for task in plain.tasks]
    assert levels(plain, groups["live"])["clip_t"].value == pytest.approx(plain.scores.column("clip_t")[:, dog].mean())


def test_runs_pair_image_by_image(place: Path, plain: Bench) -> None:
    brighter = run(place, place / "bright", "policy.shift=0.1", against=[place / "plain"])
    change = paired(brighter, plain)["clip_t"]
    assert change.value == pytest.approx(np.mean(brighter.scores.values[:, :, 1] - plain.scores.values[:, :, 1]))
    alone = levels(brighter)["clip_t"]
    assert 0 < change.high - change.low < alone.high - alone.low  # pairing takes the subjects' own level out
    assert "task by task" in (place / "bright" / "report.html").read_text(encoding="utf-8")
    assert brighter.folder.against() == [(place / "plain").resolve()]


def test_the_headline_is_the_verdict_against_the_baseline(place: Path, plain: Bench) -> None:
    def shifted(**by: float) -> Bench:
        values = plain.scores.values.copy()
        for n, name in enumerate(plain.metrics):  # another amount for each subject, so that there is an interval
            values[:, :, n] += [by.get(name, 0) * (1 + len(subject) / 10) for subject in plain.scores.subjects]
        return replace(plain, scores=replace(plain.scores, values=values))

    for by, answer in [
        ({"clip_t": 0.1}, "better"),
        ({"clip_t": 0.1, "dino": -0.1}, "undecided"),
        ({"dino": -0.1}, "worse"),
        ({"background_copied": -0.1}, "better"),
        ({}, "undecided"),
    ]:
        assert compared(shifted(**by), plain).answer == answer
    told = headline(shifted(clip_t=0.1), [plain])
    value = levels(plain)["clip_t"].value + paired(shifted(clip_t=0.1), plain)["clip_t"].value
    assert told.startswith(f"Better than plain base: CLIP-T {value:.3f} (+0.1")
    assert "; no clear difference in DINO" in told


def test_the_headline_without_a_baseline_is_held_against_real_images(place: Path, plain: Bench) -> None:
    assert compared(plain).answer == "worse"  # noise is less like the subject than its photos
    assert headline(plain).startswith("Worse than real images: DINO ")
    assert "CLIP-T" not in headline(plain)  # nobody asked anything of a photo
    pasted = plain.scores.values.copy()
    pasted[:, :, 0] = [2 + len(subject) for subject in plain.scores.subjects]
    pasted[:, :, 2] = np.nan
    assert compared(replace(plain, scores=replace(plain.scores, values=pasted))).answer == "undecided"  # no gain
    means = ", ".join(f"{plain.metrics[m].title} {levels(plain)[m].value:.3f}" for m in ("dino", "clip_t"))
    assert headline(replace(plain, real=dict.fromkeys(plain.metrics, ()))) == means
    assert headline(replace(plain, info={**plain.info, "protocol": "uno-multi"})) == means  # real images show one each


def test_differences_are_shown_by_kind(place: Path, plain: Bench) -> None:
    values = plain.scores.values.copy()
    values[:, :3, 1] += 0.25  # the dog's
    brighter = replace(plain, scores=replace(plain.scores, values=values))
    rows: dict[str, Any] = {row.title: row.cells for row in differences(brighter, plain).rows}
    assert list(rows) == ["all", "live", "object", "recontextualisation", "accessory", "property"]
    assert [rows[kind][0] for kind in ("all", "live", "object")] == ["7", "3", "4"]
    assert [rows[kind][2].value for kind in ("all", "live", "object")] == pytest.approx([0.25 * 3 / 7, 0.25, 0])


def test_warnings_are_below_the_scores(plain: Bench) -> None:
    report = (plain.folder.path / "report.md").read_text(encoding="utf-8")
    assert 0 < report.index("## Scores") < report.index("departs from the protocol") < report.index("Published")


def test_benches_that_do_not_pair_are_refused(place: Path, plain: Bench) -> None:
    other = run(place, place / "seeded", "seed=5")
    with pytest.raises(UserError, match="its seed is 5, this one's 0"):
        paired(plain, other)


def test_another_bench_in_the_folder_is_refused(place: Path, plain: Bench) -> None:
    with pytest.raises(UserError, match=r"holds a bench with other seed than this one \(0, not 7\)"):
        run(place, place / "plain", "seed=7")
    (place / "full").mkdir()
    (place / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="holds something that is not a bench"):
        run(place, place / "full")
    assert [path.name for path in (place / "full").iterdir()] == ["thesis.tex"]


def test_what_has_not_been_used_may_be_mended(place: Path) -> None:
    output = place / "mended"
    with pytest.raises(UserError, match="'nowhere' is neither an existing folder"):
        run(place, output, "metrics.clip_i={path: nowhere}")
    with pytest.raises(UserError, match="nowhere"):
        run(place, output, "policy={use: FluxKontextPolicy, path: nowhere}")
    assert run(place, output).scores.values.shape == (2, 7, 3)
    with pytest.raises(UserError, match=r"holds a bench with other metrics\.clip_t\.spec\.use than this one"):
        run(place, output, "metrics.clip_t={use: studies.bench.tiny:alike}")
    assert list(run(place, output, "metrics.clip_t=null").metrics) == ["dino", "background_copied"]


def test_a_bench_goes_on_with_less_memory(place: Path, plain: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.bench.tiny.Policy.RUNTIME", ("shift",), raising=False)
    monkeypatch.setattr("studies.bench.tiny.bright.RUNTIME", ("device",), raising=False)
    output = Path(shutil.copytree(place / "plain", place / "less"))
    info = json.loads((output / "bench.json").read_text())
    del info["subjects"]  # as older benches are
    (output / "bench.json").write_text(json.dumps(info))
    less = run(place, output, "policy.shift=0.5", "metrics.clip_t.device=cpu", "batch=1", "score_batch=1")
    assert np.array_equal(less.scores.values, plain.scores.values)
    assert less.info["policy"]["shift"] == 0.5


def test_a_folder_of_the_earlier_format_is_read_and_resumed(place: Path, plain: Bench) -> None:
    output = Path(shutil.copytree(place / "plain", place / "earlier"))
    info = json.loads((output / "bench.json").read_text())
    kept = {name for name, role in declared_roles(BenchSettings).items() if role is Role.KEPT} | {"run", "iteration"}
    identity = {**{name: info.pop(name) for name in kept}, "tasks": len(info["tasks"])}
    identity["metrics"]["background_copied"]["spec"]["use"] = "customized_grpo.compare.measures:BackgroundCopied"
    (output / "tasks.json").write_text(json.dumps(info.pop("tasks")))
    (output / "against.json").write_text(json.dumps([str(place / "plain")]))
    (output / "bench.json").write_text(json.dumps({"identity": identity, "label": "plain base", **{
        name: info[name] for name in ("about", "source", "rules", "departures", "command", "versions", "started")
    }}))  # fmt: skip
    earlier = read_bench(output)
    assert np.array_equal(earlier.scores.values, plain.scores.values)
    assert (earlier.label, earlier.tasks, earlier.folder.against()) == (plain.label, plain.tasks, [place / "plain"])
    assert paired(earlier, plain)["background_copied"].value == 0
    with pytest.raises(UserError, match="with other seed than this one"):
        run(place, output, "seed=7")
    assert np.array_equal(run(place, output).scores.values, plain.scores.values)
    written = json.loads((output / "bench.json").read_text())
    assert (written["format"], "identity" in written, len(written["tasks"])) == (2, False, 7)


@pytest.mark.parametrize(("arguments", "pairs"), [({"batch_size": 1}, True), ({"path": "other"}, False)])
def test_metrics_pair_if_their_scores_do(plain: Bench, arguments: dict, pairs: bool) -> None:
    def measured_by(**arguments: object) -> Bench:
        spec = Spec(**{"use": "DinoReward", **arguments})
        return replace(
            plain, metrics={**plain.metrics, "dino": plain.metrics["dino"].model_copy(update={"spec": spec})}
        )

    if pairs:
        assert "dino" in paired(measured_by(), measured_by(**arguments))
    else:
        with pytest.raises(UserError, match="it measures dino with another metric"):
            paired(measured_by(), measured_by(**arguments))


def test_the_identity_of_a_bench_is_what_is_not_runtime(plain: Bench) -> None:
    kept = {name for name, role in declared_roles(BenchSettings).items() if role is Role.KEPT}
    assert kept | {"run", "iteration", "tasks"} <= plain.info.keys()
    assert {"batch", "score_batch", "data"}.isdisjoint(kept)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["dreambooht"], r"no protocol 'dreambooht'.*Did you mean 'dreambooth'\?"),
        (["dreambooth"], "needs images: data=FOLDER"),
        (["dreambooth", "data=nowhere"], "There is no data folder 'nowhere'"),
        (["uno", "data=."], "needs its list of prompts and photos: prompts=FILE.json"),
        (["dreambench++", "data=."], "needs a judge: metrics.concept.model=NAME"),
        (["toyworld", "metrics.dinno=null"], "has no metric 'dinno'"),
        (["toyworld", "metrics.identity.pth=x"], "takes no setting 'pth'. Did you mean 'path'"),
        (["toyworld", "imags=3"], "There is no setting 'imags'. Did you mean 'images'"),
        (["toyworld", "uno"], "Give one protocol or YAML file, got toyworld and uno"),
        (["toyworld", "policy.shft=3"], "takes no setting 'shft'. Did you mean 'shift'"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        bench(words, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_subject_without_images_is_named(tmp_path: Path) -> None:
    data = dreambench(tmp_path / "data")
    for image in (data / "dataset" / "vase").iterdir():
        image.unlink()
    with pytest.raises(UserError, match="no images of vase"):
        bench(["dreambooth", f"data={data}"], output=tmp_path / "out")


def test_the_page_on_benches_is_what_the_code_says() -> None:
    page = (Path(__file__).parents[3] / "docs" / "bench.md").read_text(encoding="utf-8")
    assert describe_settings(BenchSettings) in page
    for protocol in PROTOCOLS.values():
        assert f"`{protocol.name}`" in page


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_plan(recipe: Path) -> None:
    plan = make_plan(read_settings([str(recipe)]), load_config())
    found = set(plan.departures()).difference(plan.protocol.departures)
    assert not [text for text in found if "policy" not in text]


def test_images_are_made_with_the_steps_of_the_evaluation() -> None:
    config = load_config(None, ["evaluation.num_inference_steps=7"])
    assert make_plan(read_settings(["toyworld"]), config).num_inference_steps == 7


def test_the_papers_settings_reach_the_policy() -> None:
    plan = make_plan(read_settings(["customized-grpo"]), load_config("uno-syncd"))
    policy = plan.config.policy.arguments
    assert (policy["resolution"], policy["guidance_scale"]) == (512, 4.0)
    assert (plan.images, plan.num_inference_steps, plan.seed, plan.departures()) == (1, 25, 3407, [])
    changed = make_plan(read_settings(["customized-grpo", "policy.resolution=1024", "images=2"]), plan.config)
    assert changed.config.policy.arguments["resolution"] == 1024
    assert changed.departures() == [
        "policy.resolution is 1024; the protocol's is 512.", "images is 2; the protocol's is 1.",
    ]  # fmt: skip


NO_GUIDANCE = "Guidance: none, the model takes none."
FREE = "Guidance: true_cfg_scale 4, classifier-free, two passes a step."


@pytest.mark.parametrize(
    ("policy", "files", "setting", "said"),
    [
        ("FluxKontextPolicy", {}, "guidance_scale", "Guidance: guidance_scale 4, embedded in the model."),
        ("Flux2DevPolicy", {}, "guidance_scale", "Guidance: guidance_scale 4, embedded in the model."),
        ("UnoPolicy", {}, "guidance_scale", "Guidance: guidance_scale 4, embedded in the model."),
        ("Flux2KleinPolicy", {}, "true_cfg_scale", FREE),
        ("QwenImageEditPolicy", {}, "true_cfg_scale", FREE),
        ("Flux2KleinKVPolicy", {}, None, NO_GUIDANCE),
        ("Flux2KleinPolicy", {"model_index.json": {"is_distilled": True}}, None, NO_GUIDANCE),
        ("FluxKontextPolicy", {"transformer/config.json": {"guidance_embeds": False}}, "true_cfg_scale", FREE),
    ],
)
def test_the_protocols_guidance_is_the_models_own_setting(
    policy: str, files: dict, setting: str | None, said: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    more = {"adapter": "owner/name"} if policy == "UnoPolicy" else {}
    config = parse_config({"policy": {"use": policy, "path": str(tmp_path), **more}}, Config)
    plan = make_plan(read_settings(["customized-grpo"]), config)
    arguments = plan.config.policy.arguments
    given = {name: arguments[name] for name in ("guidance_scale", "true_cfg_scale") if name in arguments}
    assert given == ({setting: 4.0} if setting else {})
    assert plan.departures() == ([] if setting else ["The model takes no guidance; the protocol's is 4."])
    assert describe_guidance(check_spec(plan.config.policy, "policy"), plan.config.policy) == said


def test_another_encoder_departs_and_another_environment_does_not() -> None:
    other = make_plan(read_settings(["dreambooth", "metrics.dino.path=facebook/dinov2-base"]), load_config())
    assert any("DINO is measured by" in text for text in other.departures())
    remote = "metrics.hpsv3={use: RemoteReward, reward: {use: Hpsv3Reward}, python: p}"
    same = make_plan(read_settings(["customized-grpo", remote, "metrics.dino.device=cpu"]), load_config())
    assert not [text for text in same.departures() if "measured by" in text]


def test_another_judge_departs_where_the_protocol_names_one() -> None:
    def departures(protocol: str, *words: str) -> list[str]:
        return [text for text in make_plan(read_settings([protocol, *words]), load_config()).departures()
                if "measured by" in text]  # fmt: skip

    judge = "{model: other, url: 'http://gpu-3:8000/v1'}"
    assert departures("omnicontext", "metrics.prompt={url: 'http://gpu-3:8000/v1'}") == []
    (said,) = departures("omnicontext", f"metrics.prompt={judge}")
    assert said.startswith("PF is measured by VlmJudge(rubric=omnicontext-prompt, model=other")
    assert departures("dreambench++", f"metrics.concept={judge}", f"metrics.prompt={judge}") == []


def test_xversebenchs_metrics_are_classes_of_the_users_own(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"measures DPG with a model.*metrics\.dpg\.use=.* of AnsweredQuestions"):
        make_plan(read_settings(["xversebench"]), load_config())
    words = ["metrics.dpg.use=rewards.test_xverse:Answers", "metrics.id_sim.use=rewards.test_xverse:Found",
             "metrics.ip_sim={use: rewards.test_xverse:Found, people: false}", "metrics.matched=null"]  # fmt: skip
    plan = make_plan(read_settings(["xversebench", f"data={tmp_path}", *words]), load_config())
    assert plan.metrics["ip_sim"].spec.arguments == {"data": str(tmp_path), "people": False}
    assert plan.metrics["dpg"].spec.arguments == {"data": str(tmp_path)}
    assert "matched identity is left out." in plan.departures()


def test_published_numbers_have_sources() -> None:
    rows = {row.method: row for row in published(["dino", "clip_i", "clip_t", "hpsv3"])}
    (xverse,) = (row for row in published(["id_sim"], ["xversebench-multi"]) if row.method == "XVerse")
    assert (xverse.scores, xverse.by) == ({"dpg": 91.77, "id_sim": 51.03, "ip_sim": 61.04}, "XVerse's authors")
    assert rows["UNO"].scores == {"dino": 0.760, "clip_i": 0.835, "clip_t": 0.304}
    assert rows["Customized-GRPO"].scores == {"dino": 0.812, "hpsv3": 8.32}
    assert all(row.source and row.by and row.protocol in PROTOCOLS for row in rows.values())
    assert all(row.scores.keys() <= row.metrics.keys() for row in rows.values())


def test_published_numbers_are_held_against_their_own_protocol_alone(plain: Bench) -> None:
    assert not any(row.title == "UNO" for row in scores(plain, []).rows)
    beside = {row.title: row.cells for row in publications(plain).rows}
    assert beside["UNO"] == ["uno", "UNO's authors", "no: other protocol", 0.760, 0.304, "–"]
    assert beside["Customized-GRPO"][:3] == ["customized-grpo", "its authors", "no: other protocol"]

    def said(departures: list[str]) -> Any:
        bench = replace(plain, info={**plain.info, "protocol": "uno", "departures": departures})
        return {row.title: row.cells for row in publications(bench).rows}["UNO"][2]

    assert said(["seed is 3."]) == "no: departures"
    assert said([]) == "roughly"
    (omnigen2,) = (row for row in published(["overall"], ["omnicontext"]) if row.method == "OmniGen2")
    always = list(PROTOCOLS["omnicontext"].departures)  # every bench of the protocol has them
    for departures, told in ((always, "roughly"), ([*always, "seed is 3."], "no: departures")):
        info = {**plain.info, "protocol": "omnicontext", "departures": departures}
        assert omnigen2.comparability(replace(plain, info=info)) == told


def test_a_background_that_nothing_tells_has_no_column(plain: Bench) -> None:
    assert list(columns(plain).values()) == ["DINO", "CLIP-T", "background copied ↓"]
    values = plain.scores.values.copy()
    values[:, :, 2] = np.nan
    assert list(columns(replace(plain, scores=replace(plain.scores, values=values))).values()) == ["DINO", "CLIP-T"]


def test_bench_json_tells_the_rules(plain: Bench) -> None:
    assert plain.label == "plain base"
    info = json.loads(BenchFolder(plain.folder.path).info.read_text(encoding="utf-8"))
    assert info["rules"][0] == f"7 prompts for {len(COLOURS)} subjects, 2 images each: 14 images."
    assert "3 subjects; the protocol has 30." in info["departures"]
    assert "CLIP-I is left out." in info["departures"]
