"""Reports: numbers by hand, and a page for whatever a run left behind."""

import json
import math
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fakes
from customized_grpo import page
from customized_grpo.errors import UserError
from customized_grpo.page import formats, plots
from customized_grpo.settings.parse import parse_config
from customized_grpo.store.run import RunFolder, read_run
from customized_grpo.store.scores import Estimate, Scores, write_scores
from customized_grpo.studies.report import write_report
from customized_grpo.studies.report.remarks import remarks
from customized_grpo.studies.report.run import compared, contents, headline, pairs_of_images, stages
from customized_grpo.studies.report.verdict import Verdict
from customized_grpo.train.settings import TrainerConfig
from customized_grpo.train.trainer import Trainer
from store.tables import BASE, by_kind, ones, table


def save(result: Scores, run: Path) -> None:
    write_scores(RunFolder(run).evaluation(result.iteration), result)


def row(iteration: int, rewards: tuple[str, ...] = ("prompt", "identity"), **changed: Any) -> dict[str, Any]:
    logged: dict[str, Any] = {"iteration": iteration, "samples": 8 * iteration}
    for name in rewards:
        logged |= {f"reward/{name}/mean": 0.5 + 0.01 * iteration, f"reward/{name}/spread": 0.1}
        logged[f"reward/{name}/unscored"] = 0
    if len(rewards) > 1:
        logged |= {"conflict/share": 0.5, "conflict/both_positive": 0.3, "conflict/both_negative": 0.2}
        logged["conflict/correlation"] = -0.1 * iteration
    logged |= {"update/clip_share": 0.1 * iteration, "update/first_ratio_error": 0.0, "update/grad_norm": 0.01}
    logged |= {"update/skipped": 0, "advantage/clamped": 0.0, "seconds/rollout": 2.0, "seconds/update": 3.0}
    return logged | {key.replace("__", "/"): value for key, value in changed.items()}


def write_rows(run: Path, rows: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A small finished run with everything in it."""
    folder = tmp_path / "a run"
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text("training:\n  iterations: 3\n")
    summary = {"model": "tiny", "trainable_parameters": 10, "total_parameters": 100, "rewards": ["prompt", "identity"]}
    info = {"name": "demo", "command": ["cgrpo", "train", "a b"], "status": "finished", "seconds": 20.0}
    info |= {"summary": {**summary, "samples_per_iteration": 8}, "versions": {"torch": "2"}, "hardware": "a laptop"}
    (folder / "run.json").write_text(json.dumps(info))
    write_rows(folder, [row(i) for i in (1, 2, 3)])
    metrics = ("prompt", "identity", "subject_kept")
    save(table(0, BASE, BASE, BASE, metrics=metrics), folder)
    save(table(3, BASE + 0.2, BASE - 0.1, BASE + np.array([0.1, -0.1, 0.1, -0.1, 0]), metrics=metrics), folder)
    for name in ("over_training", "iteration-000000", "iteration-000003"):
        Image.new("RGB", (40, 20), "red").save(folder / "samples" / f"{name}.png")
    (folder / "samples" / "cells").mkdir()
    (folder / "samples" / "cells" / "000-prompt.txt").write_text("a <b>cat</b>")
    return folder


def text_of(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", html, flags=re.S)).split())


# What the intervals say


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ({"prompt": 0.1, "identity": -0.1}, "Prompt 0.300 → 0.400 and identity 0.300 → 0.200 on held-out subjects."),
        ({"prompt": 0.1}, "Prompt 0.300 → 0.400 on held-out subjects."),
        (
            {"prompt": 0, "identity": 0.1, "style": 0.2},
            "Prompt 0.300 → 0.300 and identity 0.300 → 0.400 on held-out subjects.",
        ),
    ],
)
def test_the_headline_is_in_numbers(run: Path, differences: dict[str, float], expected: str) -> None:
    metrics = tuple(differences)
    before = table(0, *(BASE for _ in metrics), metrics=metrics)
    after = table(1, *(BASE + d for d in differences.values()), metrics=metrics)
    answer, lead = headline(read_run(run), Verdict(before, after))
    assert answer == expected
    assert ("Not trained on: style 0.300 → 0.500." in lead) == ("style" in metrics)


# The page


def test_the_report_is_one_page_that_needs_no_network(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    html = path.read_text()
    text = text_of(html)
    assert "Prompt 0.300 → 0.500 and identity 0.300 → 0.200 on held-out subjects." in text
    assert "Not trained on: subject kept 0.300 → 0.300." in text
    assert "finished, 3 iterations" in text
    assert "cgrpo train &#39;a b&#39;" in html
    for source in re.findall(r'src="([^"]*)"', html):
        assert source.startswith("data:image/")
    for link in re.findall(r'href="([^"]*)"', html):
        assert link.startswith(("#", "data:")) or (run / link).is_file()
    assert not re.search(r"@import|url\(|<link rel=.stylesheet|<script src", html)


@pytest.mark.usefixtures("plotted")
def test_plots_lie_beside_the_page_as_svg_and_png(run: Path) -> None:
    write_report(run)
    names = {path.stem for path in (run / "plots").glob("*.svg")}
    assert names == {path.stem for path in (run / "plots").glob("*.png")}
    assert names >= {"reward-prompt", "reward-identity", "reward-subject_kept", "trade-off", "conflict-shares"}


@pytest.mark.usefixtures("plotted")
def test_the_same_run_gives_the_same_page(run: Path) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_text_from_the_run_is_escaped(run: Path) -> None:
    (run / "config.yaml").write_text("note: <script>alert(1)</script>\n")
    html = write_report(run).read_text()
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html
    assert "<b>cat" not in html
    assert "The rows: a &lt;b&gt;cat&lt;/b&gt;." in html, "a picture's prompts are there for who cannot see them"


HOSTILE = ("$x_{\\frac$", "_a\\b/{0}<script>alert(1)</script>&$^$", "%s|c\n..")


@pytest.mark.usefixtures("plotted")
def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    """Of rewards, prompts and the run folder, in every plot and on the page."""
    examples = [replace(example, prompt="a\nhat for $5_$") for example in fakes.examples(2)]
    tree = {
        "output": str(tmp_path / "$_{run}"), "tracking": {"log_with": []},
        "rollout": {"num_generations": 2, "num_inference_steps": 3},
        "training": {"iterations": 3, "prompts_per_iteration": 2}, "evaluation": {"examples": 2, "replicates": 1},
    }  # fmt: skip
    rewards = dict(zip(HOSTILE, (fakes.red, fakes.dark), strict=False))
    metrics = {HOSTILE[2]: fakes.dark}
    config = parse_config(tree, TrainerConfig)
    run = Trainer(fakes.LinearPolicy(), rewards, examples, examples, config, metrics).train().run
    html = write_report(run).read_text()
    assert "<script>alert" not in html
    drawn = "".join(file.read_text() for file in (run / "plots").glob("reward-*.svg"))
    assert len(list((run / "plots").glob("reward-*.svg"))) == 3
    for name in HOSTILE:
        assert formats.words(name).split("\n")[0].strip() in unescape(drawn)


def test_names_of_methods_are_drawn_as_they_are(tmp_path: Path) -> None:
    at = Estimate(0.5, 0.4, 0.6)
    tracks = [plots.Track(name, [at, at], [at, at]) for name in HOSTILE[:2]]
    figures = {
        "plane": plots.plane(tracks, (0, 0), xlabel=HOSTILE[0], ylabel=HOSTILE[1]),
        "lines": plots.lines([0, 1], [plots.Line(name, [at, at]) for name in HOSTILE[:2]], xlabel="x", ylabel="y"),
        "forest": plots.forest([(name, at) for name in HOSTILE[:2]], xlabel="gain"),
    }
    for name, figure in figures.items():
        drawn = unescape(plots.save(figure, tmp_path, f"{name}-{HOSTILE[0]}/..").read_text())
        assert all(hostile in drawn for hostile in HOSTILE[:2]), name
    assert all(re.fullmatch(r"[\w.-]+", file.name) for file in tmp_path.iterdir())


def test_files_of_plots_with_different_names_are_different(tmp_path: Path) -> None:
    files = {plots.save(plots.canvas(2, 2)[0], tmp_path, name) for name in ("a/b", "a-b", "a b", "a$b", "x" * 300)}
    assert len(files) == 5


def test_time_is_shared_out_over_stages(run: Path) -> None:
    found = {stage.name: stage for stage in stages(read_run(run))}
    assert found["rollout"].total == 6
    assert found["update"].per_iteration == 3
    assert found["outside iterations"].total == 20 - 15
    assert sum(stage.share for stage in found.values()) == pytest.approx(1)


def test_three_rewards(run: Path) -> None:
    names = ("prompt", "identity", "style")
    info = json.loads((run / "run.json").read_text())
    info["summary"]["rewards"] = names
    (run / "run.json").write_text(json.dumps(info))
    write_rows(run, [row(i, names) for i in (1, 2, 3)])
    for iteration in (0, 3):
        save(replace(table(iteration, *[BASE + iteration] * 3, metrics=names), rewards=names), run)
    text = text_of(write_report(run).read_text())
    assert "Prompt 0.300 → 3.300, identity 0.300 → 3.300 and style 0.300 → 3.300" in text
    assert "style" in text


def test_one_reward_has_no_conflict(run: Path) -> None:
    info = json.loads((run / "run.json").read_text())
    info["summary"]["rewards"] = ["prompt"]
    (run / "run.json").write_text(json.dumps(info))
    write_rows(run, [row(i, ("prompt",)) for i in (1, 2)])
    assert "Conflict needs two rewards" in text_of(write_report(run).read_text())


# What a killed, unfinished or damaged run left


def test_the_configuration_alone(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("training: {iterations: 40}\n")
    text = text_of(write_report(tmp_path).read_text())
    for sentence in (
        "No held-out evaluation yet.",
        "No iteration has been logged yet.",
        "No sample grids have been written.",
        "No rewards have been logged.",
        "No update has been logged.",
        "No times have been logged.",
        "unknown, iteration 0 of 40",
    ):
        assert sentence in text


def test_one_evaluation_is_shown_but_not_compared(run: Path) -> None:
    (run / "evaluations" / "iteration-000003.json").unlink()
    text = text_of(write_report(run).read_text())
    assert "One held-out evaluation so far, at iteration 0." in text
    assert compared(read_run(run)) is None


@pytest.mark.parametrize(
    ("status", "sentence"),
    [("running", "still going"), ("interrupted", "resumed"), ("failed", "The run failed"), ("killed", "was killed")],
)
def test_an_unfinished_run_says_so(run: Path, status: str, sentence: str) -> None:
    info = json.loads((run / "run.json").read_text())
    said = "running" if status == "killed" else status  # run.json cannot say it, the lock can
    (run / "run.json").write_text(json.dumps({**info, "status": said, "seconds": None, "finished": None}))
    write_rows(run, [row(1)])
    with RunFolder(run).lock() if status == "running" else nullcontext():
        text = text_of(write_report(run).read_text())
    assert f"{status}, iteration 1 of 3" in text
    assert sentence in text
    assert "finished, 1 iterations" in text_of(write_report(run, "finished").read_text())


def test_a_cut_last_line_is_left_out_and_mentioned(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "reward/pro')
    record = read_run(run)
    assert record.iterations.tolist() == [1, 2, 3]
    assert "cut off" in text_of(write_report(run).read_text())


def test_damaged_lines_are_counted_with_their_numbers(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], "nonsense", "[]", lines[2], ""]))
    record = read_run(run)
    assert record.iterations.tolist() == [1, 3]
    assert record.problems == ("2 of 4 lines of metrics.jsonl are damaged and left out (line 2, 3).",)


def test_an_iteration_done_again_after_a_resume_counts_once(run: Path) -> None:
    write_rows(run, [row(1), row(2), row(2, samples=99), row(3)])
    record = read_run(run)
    assert record.iterations.tolist() == [1, 2, 3]
    assert record.series("samples").tolist() == [8, 99, 24]


def test_damaged_files_are_named(run: Path) -> None:
    (run / "run.json").write_text("{")
    (run / "evaluations" / "iteration-000002.json").write_text(
        '{"iteration": 2, "metrics": ["a"], "tasks": [], "values": 1}'
    )
    (run / "samples" / "over_training.png").write_bytes(b"not a picture")
    text = text_of(write_report(run).read_text())
    for sentence in (
        "Run.json is damaged",
        "Evaluations/iteration-000002.json is damaged",
        "Samples/over_training.png could not be read",
    ):
        assert sentence in text


def test_nothing_but_nan(run: Path) -> None:
    write_rows(run, [dict.fromkeys(row(1), math.nan) | {"iteration": i} for i in (1, 2)])
    empty = np.full(5, math.nan)
    for iteration in (0, 3):
        save(table(iteration, empty, empty), run)
    text = text_of(write_report(run).read_text())
    assert "Prompt could not score 10 of 10 held-out pictures; 5 of 5 tasks are left out of its change." in text


def test_health_is_remarked_on(run: Path) -> None:
    bad = {"reward/prompt/unscored": 2, "reward/identity/spread": 0.0, "update/first_ratio_error": 0.01}
    bad |= {"update/clip_share": 0.9, "advantage/clamped": 0.2, "update/velocity_norm": 1.2}
    write_rows(run, [row(i) | bad | {"update/skipped": skipped} for i, skipped in ((1, 0), (2, 2), (3, 2))])
    save(table(3, BASE + 0.2, BASE, BASE - 0.2, metrics=("prompt", "identity", "subject_kept")), run)
    record = read_run(run)
    found = remarks(record, compared(record))
    hacking = "subject kept 0.300 → 0.100 (−0.200 [no spread]), which was not trained on, fell while prompt rose"
    assert f"{hacking}: reward hacking? (3 subjects: too few to be sure)." in {r.text for r in found if not r.serious}
    serious = {remark.text for remark in found if remark.serious and not remark.text.startswith("Only 3 subjects")}
    assert serious == {
        "prompt could not score 6 of 24 training samples.",
        "identity was the same for every sample of a group, so it taught nothing.",
        "2 updates were skipped: loss or gradient was not finite.",
        "The first update's ratio was off by up to 0.01: the update does not recompute what the rollout sampled.",
        "The clip stopped 90% of the gradient at the end: lower the learning rate.",
        "20% of the advantages were clamped.",
        "The norm of the velocity is 1.20 times what it was: images lose quality that the rewards do not see; set "
        "method.norm_hinge or method.beta, or lower the learning rate.",
    }


def test_a_healthy_run_gives_no_remark_but_on_its_three_subjects(run: Path) -> None:
    said = [block for block in contents(read_run(run)).summary if isinstance(block, page.Remarks)]
    assert [[remark.text.split(":")[0] for remark in block.remarks] for block in said] == [["Only 3 subjects"]]


@pytest.fixture
def kinds(run: Path) -> Path:
    """The run with twelve subjects of each of two kinds, one of which lost what had been right."""
    metrics, spread = ("prompt", "identity", "oracle_right"), np.linspace(0.4, 0.6, 12)
    for iteration, right in ((0, 10), (3, 1)):
        columns = {"a b": [spread, spread + iteration / 10, ones(right, 12)], "scene": [spread, spread, ones(5, 12)]}
        save(by_kind(iteration, metrics, **columns), run)
    for file, colour in (("reference", "red"), ("iteration-000000", "green"), ("iteration-000003", "blue")):
        Image.new("RGB", (8, 8), colour).save(run / "samples" / "cells" / f"000-{file}.png")
    (run / "samples" / "cells" / "000-iteration-000003.json").write_text('{"<hat>": true, "blue hat": false}')
    return run


@pytest.mark.usefixtures("plotted")
def test_a_run_with_kinds_shows_them(kinds: Path) -> None:
    html = write_report(kinds).read_text()
    text = text_of(html)
    assert "Worst kind, a: fully right 10 of 12 → 1 of 12 images." in text
    assert "A got worse: fully right 10 of 12 → 1 of 12 images" in text
    assert "identity 0.500 → 0.800 (+0.300 [no spread]) rose while fully right 10 of 12 → 1 of 12 images" in text
    order = ["Worst kind", "Images", "Before and after, by kind", "Rewards over training", "Conflict between", "Health",
             "Where the time went"]  # fmt: skip
    places = [text.rindex(words) if n else text.index(words) for n, words in enumerate(order)]
    assert places == sorted(places)
    assert {path.stem for path in (kinds / "plots").glob("kinds-*.svg")} == {
        "kinds-prompt", "kinds-identity", "kinds-oracle_right"
    }  # fmt: skip
    assert re.findall(r"<figcaption>([^<]*)</figcaption>", html)[:3] == ["reference", "base", "tuned, iteration 3"]
    assert '<span class="mark rose">✓ &lt;hat&gt;' in html
    assert "✗ blue hat" in html


def test_images_are_chosen_by_rule_worst_first(kinds: Path) -> None:
    """Tasks 1 to 9 were right and are not, and no other changed."""
    cells = kinds / "samples" / "cells"
    for place in range(14):
        for file in ("reference", "iteration-000000", "iteration-000003"):
            Image.new("RGB", (8, 8), "red").save(cells / f"{place:03d}-{file}.png")
        (cells / f"{place:03d}-prompt.txt").write_text(f"task {place}")
    text = write_report(kinds).with_suffix(".md").read_text()
    assert "The 6 worst and the 6 best of all 14 tasks whose images are kept, drawn from the same noise" in text
    shown = [int(n) for n in re.findall(r"^\* task (\d+) \(", text, re.M)]
    assert shown == [1, 2, 3, 4, 5, 6, 9, 0, 10, 11, 12, 13]
    assert "* task 1 (a, fully right 1.000 → 0)" in text
    assert "![reference, base, tuned, iteration 3](plots/images.png)" in text
    assert (kinds / "plots" / "images.png").is_file()


def test_images_are_chosen_among_all_tasks(kinds: Path) -> None:
    cells, record = kinds / "samples" / "cells", read_run(kinds)

    def shown() -> tuple[str, list[str]]:
        problems: list[str] = []
        rule, images = pairs_of_images(record, compared(record), problems)
        assert isinstance(rule, page.Text)
        assert isinstance(images, page.ImageGrid)
        assert not problems
        return rule.text.split(",")[0], [f"{row.prompt} ({row.rank})" for row in images.rows]

    for place in range(1, 24):
        for file in ("reference", "iteration-000000", "iteration-000003"):
            Image.new("RGB", (8, 8), "red").save(cells / f"{place:03d}-{file}.jpg")
    rule, rows = shown()
    assert rule == "The 6 worst and the 6 best of all 24 evaluated tasks"
    assert rows[:6] == ["a cat (a, fully right 1.000 → 0)"] * 6
    assert [row.split(",")[0] for row in rows[6:]] == ["a cat (scene"] * 6
    for place in range(13, 24):  # as in a run that was resumed from an earlier iteration
        (cells / f"{place:03d}-iteration-000003.jpg").unlink()
    assert shown()[0] == "The 6 worst and the 6 best of all 13 tasks whose images are kept"


def test_groups_show_what_the_update_prefers(run: Path) -> None:
    folder = run / "samples" / "groups"
    folder.mkdir()
    # What is named is looked for in this folder alone.
    for iteration, elsewhere in ((1, ""), (2, ""), (3, "../../")):
        scores = {"rewards": [0.5, None], "z": [1.5, None]}
        images = [{"file": f"{elsewhere}0-{g}.jpg", **scores, "advantages": [g - 1.0, g]}
                  for g in range(3)]  # fmt: skip
        groups = [{"prompt": "a <b>", "kind": "scene", "images": images}]
        (folder / f"iteration-00000{iteration}.json").write_text(
            json.dumps({"rewards": ["prompt", "x"], "groups": groups})
        )
    for g in range(3):
        Image.new("RGB", (8, 8), "red").save(folder / f"0-{g}.jpg")
    text = write_report(run).with_suffix(".md").read_text()
    told = "1: ▲ +1.00 → +2.00, prompt 0.50 (z +1.50), x – (z –); 2: ▲ +0.00 → +1.00"
    assert [line.split(". ")[0] for line in text.splitlines() if told in line] == [
        "* a <b> (iteration 1, scene)", "* a <b> (iteration 3, scene)"
    ]  # fmt: skip
    assert text.count("3: ▼ −1.00 → +0.00") == 2
    (folder / "iteration-000003.json").write_text("{")
    (folder / "0-0.jpg").write_bytes(b"")
    html = write_report(run).read_text()
    assert html.count("one of its images could not be read") == 2
    assert "No training groups have been kept." in html


def test_an_image_that_is_gone_is_named(kinds: Path) -> None:
    (kinds / "samples" / "cells" / "000-iteration-000000.png").write_bytes(b"")
    assert "Samples/cells/000-iteration-000000.png could not be read" in text_of(write_report(kinds).read_text())


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_what_is_no_run_is_one_clear_sentence(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "x"
    if kind == "empty":
        folder.mkdir()
    elif kind == "file":
        folder.write_text("")
    with pytest.raises(UserError, match="is not a run" if kind == "empty" else "There is no folder"):
        write_report(folder)


@pytest.mark.usefixtures("plotted")
def test_a_folder_that_takes_no_report(run: Path) -> None:
    (run / "plots").write_text("in the way")
    with pytest.raises(UserError, match=r"plots/.* could not be written"):
        write_report(run)
    assert not (run / "report.html").exists()


# Parts


def test_a_large_picture_is_embedded_smaller_and_left_alone_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.new("RGB", (3000, 300)).save(path)
    before = path.read_bytes()
    picture = page.embed(path, base=tmp_path, alt="")
    assert picture.source.startswith("data:image/jpeg")
    assert picture.link == "large.png"
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.51234, "0.512"),
        (-1.5, "−1.500"),
        (12.345, "12.35"),
        (1234.5, "1,234"),
        (4e-5, "4.0e−5"),
        (math.nan, "–"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert formats.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.423, "0.42 s"),
        (7.31, "7.3 s"),
        (59.97, "1 min 00 s"),
        (312, "5 min 12 s"),
        (11040, "3 h 04 min"),
        (math.nan, "–"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert formats.duration(seconds) == text


def test_running_mean_is_centred_and_skips_what_is_missing() -> None:
    values = np.array([1.0, 2.0, math.nan, 6.0])
    np.testing.assert_allclose(plots.running_mean(values, 3), [1.5, 1.5, 4.0, 6.0])
    np.testing.assert_array_equal(plots.running_mean(values, 1), values)


def test_what_is_undefined_is_a_gap_and_no_zero(tmp_path: Path) -> None:
    x, y = np.arange(5), np.array([0.4, 0.4, math.nan, 0.4, 0.4])
    shares = plots.conflict_shares(x, {"conflict": y, "both better": y / 2, "both worse": y / 2})
    for area in shares.axes[0].collections:
        assert [path.vertices[:, 0].max() for path in area.get_paths()] == [1, 4]
    shares = plots.conflict_shares(x, {"conflict": np.where(x < 1, 0.4, math.nan)}, window=1)
    assert [label.get_text() for label in shares.axes[0].texts] == ["conflict  40%", "chance"]
    band, *_ = plots.training_curve(x, np.ones(5), y, [], []).axes[0].collections
    assert [path.vertices[:, 0].max() for path in band.get_paths()] == [1, 4]
    levels = [Estimate(0.5, math.nan, math.nan), Estimate(0.6, 0.5, 0.8)]
    assert plots.whiskers(levels) == pytest.approx(np.array([[math.nan, 0.1], [math.nan, 0.2]]), nan_ok=True)
    curve = plots.training_curve(x, y, y, [0, 4], levels)
    for n, figure in enumerate((shares, curve)):
        plots.save(figure, tmp_path, str(n))


@pytest.mark.parametrize(("values", "seen", "marked"), [
    ([0.2, 0.3], (0.195, 0.305), []), ([0.4, 0.7], (0.385, 0.5), [0.7]), ([0.8, 0.9], (0.489, 0.5), [0.8, 0.9]),
])  # fmt: skip
def test_the_healthy_band_is_drawn_and_what_is_outside_is_marked(
    values: list[float], seen: tuple[float, float], marked: list[float]
) -> None:
    (axes,) = plots.vital_sign(np.arange(2), np.array(values), band=(-math.inf, 0.5)).axes
    (band,) = axes.patches
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx(seen)
    assert list(axes.lines[1].get_ydata()) == marked


def test_captions_name_the_healthy_band(run: Path) -> None:
    write_rows(run, [row(i, update__velocity_norm=1 + i / 100, nft__r_std=i / 10) for i in (1, 2, 3)])
    html = write_report(run).read_text()
    assert "healthy up to 1.100 (green)" in html
    assert "healthy from 0.050 to 0.500 (green)" in html


@pytest.mark.parametrize("count", [0, 1, 2])
def test_plots_of_few_points(tmp_path: Path, count: int) -> None:
    x, y = np.arange(count), np.linspace(0.1, 0.4, count)
    shares = {"conflict": y, "both better": y, "both worse": y}
    estimates = [Estimate(v, math.nan, math.nan) for v in y]
    figures = {
        "curve": plots.training_curve(x, y, y, list(x), estimates),
        "shares": plots.conflict_shares(x, shares),
        "correlation": plots.correlation(x, y, window=3),
        "vital": plots.vital_sign(x, y, band=(0.05, 0.2), logarithmic=True),
    }
    for name, figure in figures.items():
        assert "<svg" in plots.save(figure, tmp_path, name).read_text()


def test_importing_reports_is_light() -> None:
    code = "import sys, customized_grpo.studies.report; print({'torch', 'matplotlib', 'jinja2'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
