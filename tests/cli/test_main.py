"""The command line on the embedded model: small runs, real processes, real kills."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from customized_grpo.cli import main as cli
from customized_grpo.errors import UserError
from customized_grpo.settings.recipes import RECIPES
from customized_grpo.sources import locate
from customized_grpo.train.trackers import RunFolder

TRANSFORMER = Path(locate("toyworld:pipeline"), "transformer", "diffusion_pytorch_model.safetensors")

SMALL = [
    "training.prompts_per_iteration=2", "rollout.num_generations=4", "rollout.num_inference_steps=4",
    "evaluation.examples=4", "evaluation.replicates=1", "evaluation.every=0", "checkpoint.every=1",
    "policy.dtype=float32",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}


def cgrpo(*words: object, cwd: Path, expect: int = 0) -> str:
    """Run the command; its output, standard error included."""
    done = subprocess.run(
        [sys.executable, "-m", "customized_grpo", *map(str, words)],
        cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def metrics(run: Path) -> list[dict]:
    lines = RunFolder(run).records()
    return [{k: v for k, v in line.items() if not k.startswith(("seconds/", "memory/"))} for line in lines]


def trained(run: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").glob("iteration-*"))[-1]
    return load_file(newest / "trainable.safetensors")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four iterations without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    text = cgrpo("train", *SMALL, "training.iterations=4", "output=run", cwd=folder)
    assert "held-out" in text.lower()
    assert "report.html" in text
    assert "8 images on 1 process, about" in text
    assert re.search(r"memory +about [\d.]+ [MG]iB: libraries", text)
    (folder / "output.txt").write_text(text)
    return folder / "run"


def test_a_run_folder_holds_everything(straight: Path) -> None:
    names = {path.name for path in straight.iterdir()}
    assert names >= {"config.yaml", "run.json", "metrics.jsonl", "evaluations", "samples", "checkpoints", "report.html"}
    assert list(straight.rglob("events.out.tfevents*"))
    assert len(metrics(straight)) == 4
    assert all(line["update/first_ratio_error"] == 0 for line in metrics(straight))
    before = load_file(TRANSFORMER)
    assert any(not torch.equal(tensor, before[name].float()) for name, tensor in trained(straight).items())


def test_resume_after_a_kill_is_exact(straight: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "customized_grpo", "train", *SMALL, "training.iterations=4", "output=run"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    checkpoint = tmp_path / "run" / "checkpoints" / "iteration-000002"
    limit = time.monotonic() + 200
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert checkpoint.exists()
    assert not (tmp_path / "run" / "checkpoints" / "iteration-000004").exists()
    cgrpo("train", "--resume", "run", cwd=tmp_path)
    assert metrics(tmp_path / "run") == metrics(straight)
    theirs, ours = trained(straight), trained(tmp_path / "run")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_sigterm_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "customized_grpo", "train", *SMALL, "training.iterations=500", "output=run"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    log = tmp_path / "run" / "metrics.jsonl"
    limit = time.monotonic() + 200
    while not log.exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 130, text
    assert "cgrpo train --resume run" in text
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    done = len(metrics(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / f"iteration-{done:06d}").is_dir()


def test_generate_draws_base_and_tuned(straight: Path, tmp_path: Path) -> None:
    Image.new("RGB", (80, 50), "orange").save(tmp_path / "cat.png")
    text = cgrpo(
        "generate", "--run", straight, "--reference", "cat.png", "--prompt", "a cube on the beach", "--output", "x.png",
        cwd=tmp_path,
    )  # fmt: skip
    assert "a cube on the beach" in text
    with Image.open(tmp_path / "x.png") as sheet:
        assert sheet.width > 300
    assert "does not know" not in text
    assert "turns a photo into blobs" in text
    again = cgrpo("generate", "--run", straight, "--output", "x.png", cwd=tmp_path, expect=2)
    assert "already exists" in again
    again = cgrpo("generate", "--run", straight, "--output", "x", cwd=tmp_path, expect=2)
    assert "'x' already exists" in again, "x.png would have been overwritten"
    text = cgrpo("generate", "--run", straight, "--output", "x.yaml", cwd=tmp_path, expect=2)
    assert "ends in '.yaml', which is not an image format" in text


def test_the_next_command_can_be_typed_as_it_is_printed(straight: Path) -> None:
    output = (straight.parent / "output.txt").read_text()
    (printed,) = re.findall(r"^next +(.+? generate --run \S+)  ", output, re.M)
    for command in (printed, re.findall(r"^ +(.+?) --logdir", output, re.M)[0] + " --version"):
        done = subprocess.run(
            command, shell=True, cwd=straight.parent, env=ENVIRONMENT, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert len(list((straight / "generated").glob("*.png"))) == 1


def test_eval_compares_a_run_with_its_base(straight: Path, tmp_path: Path) -> None:
    text = cgrpo("eval", "--run", straight, "--output", "scores", cwd=tmp_path)
    assert "base" in text
    assert "iteration 4" in text
    before = json.loads((tmp_path / "scores" / "iteration-000000.json").read_text())
    logged = json.loads((straight / "evaluations" / "iteration-000000.json").read_text())
    assert before["values"] == logged["values"]


def test_the_users_own_photos_train(tmp_path: Path) -> None:
    lines = []
    for index, (name, size) in enumerate([("dog", (90, 60)), ("cat", (50, 120)), ("cup", (64, 64))]):
        (tmp_path / name).mkdir()
        Image.effect_noise(size, 80).convert("RGB").save(tmp_path / name / "0.jpg")
        lines.append(
            {"id": index, "prompt": f"a {name} on the beach", "references": [f"{name}/0.jpg"], "subject": name}
        )
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    small = [word for word in SMALL if "evaluation.examples" not in word]
    text = cgrpo("train", "data.train=data.jsonl", *small, "training.iterations=1", "output=run", cwd=tmp_path)
    assert "Held-out" in text
    assert "oracle" not in text
    evaluation = json.loads((tmp_path / "run" / "evaluations" / "iteration-000001.json").read_text())
    assert [task["prompt"] for task in evaluation["tasks"]] == ["a cup on the beach"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["config", "training.iteration=5"], "There is no setting 'training.iteration'. Did you mean 'iterations'?"),
        (["config", "rollout.num_generations=1"], "'rollout.num_generations' is 1: expected 2 or more"),
        (["config", "--check", "method.advantage=sras"], "there is no 'sras' .* Did you mean 'sars'?"),
        (["train", "nowhere.yaml"], "There is no configuration file 'nowhere.yaml'"),
        (["train", "data.train=nowhere.jsonl"], "There is no data file 'nowhere.jsonl'"),
        (["train", "--resume", "nowhere"], "'nowhere' is not a run folder: it does not exist"),
        (["generate", "--run", "nowhere"], "'nowhere' is not a run folder"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_status_two(tmp_path: Path, words: list[str], sentence: str) -> None:
    text = cgrpo(*words, cwd=tmp_path, expect=2)
    assert re.search(sentence.replace("?", r"\?"), text), text
    assert len(text.strip().splitlines()) == 1
    assert "Traceback" not in text


@pytest.mark.parametrize("name", ["output/run", "missing/../closed.yaml"])
def test_an_operating_system_that_says_no_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    from customized_grpo.cli import main as cli

    def refuse(**settings: object) -> None:
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr(cli, "app", refuse)
    monkeypatch.setattr(sys, "argv", ["cgrpo", "train"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    said = " ".join(capsys.readouterr().err.split())
    advice = "check the permissions or choose another path"
    assert said == f"error: Permission denied for '{name}'; {advice}."


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["report", "n" * 300], f"File name too long for '{'n' * 100}'; check the path."),
        (["eval", "--output", "photo.png"], "The output 'photo.png' is a file; choose a folder as --output."),
        (
            ["eval", "--output", "photo.png/y"],
            "'photo.png/y' cannot be made, because 'photo.png' is a file; name another",
        ),
        (["eval", "--checkpoint", "best"], "--checkpoint names a checkpoint of a run; give --run too."),
        (["report", "caf\udce9"], "'caf\\udce9' is not UTF-8 text; rename the file, or type the word again."),
        (["config", "--check", "tracking.project=caf\udce9"], "'tracking.project=caf\\udce9' is not UTF-8 text;"),
        (["train", "--resume", "photo.png"], "'photo.png' is not a run folder: it is a file."),
    ],
)
def test_a_path_that_cannot_be_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    (tmp_path / "photo.png").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cgrpo", *words])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert sentence in capsys.readouterr().err.replace("\n", "")


@pytest.mark.parametrize("words", [["generate"], ["eval"], ["probe"], ["bench", "toyworld"]])
def test_a_checkpoint_that_is_not_there_is_missed_before_anything_is_loaded(
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
) -> None:
    def load(*given: object) -> None:
        raise AssertionError("a model was loaded")

    for module in ("assemble", "cli.generation"):
        monkeypatch.setattr(f"customized_grpo.{module}.build_policy", load)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cgrpo", *words, "--run", str(straight), "--checkpoint", "99"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "has no checkpoint of iteration 99" in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_a_module_beside_one_is_found(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def bright(images, examples):\n    return images.mean((1, 2, 3))\n")
    words = ["rewards", "check", "rewards={bright: 'mine:bright'}", "metrics={}"]
    script = "import sys; sys.path.remove(''); from customized_grpo.cli.main import main; main()"
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_rewards_check_fails_if_nothing_is_scored(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n\n\ndef none(images, examples):\n    return torch.full((len(images),), torch.nan)\n\n\n"
        "none.unscored = 'the judge said [/]: \\x1b[2J'\n"
    )
    text = cgrpo("rewards", "check", "rewards={b: 'mine:none'}", "metrics={}", cwd=tmp_path, expect=1)
    words = " ".join(text.replace("│", " ").split())
    assert "It scored none of the 4 images" in words
    assert "[/]: \\x1b[2J" in words


def test_a_folder_in_use_is_refused_before_anything_is_loaded(straight: Path, tmp_path: Path) -> None:
    before = sorted(straight.rglob("*"))
    text = cgrpo("train", f"output={straight}", cwd=tmp_path, expect=2)
    assert "holds something already" in text
    assert sorted(straight.rglob("*")) == before


def test_the_printed_configuration_can_be_read_back(tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(cgrpo("config", "seed=7", cwd=tmp_path))
    assert cgrpo("config", "all.yaml", cwd=tmp_path) == (tmp_path / "all.yaml").read_text()


def test_help_and_version(tmp_path: Path) -> None:
    from customized_grpo import __version__

    assert cgrpo("--version", cwd=tmp_path).strip() == __version__
    for command in ("train", "generate", "eval", "config", "report"):
        assert command in cgrpo("--help", cwd=tmp_path)
        assert "Usage" in cgrpo(command, "--help", cwd=tmp_path)


def test_help_shows_brackets_as_they_are() -> None:
    command = typer.main.get_command(cli.app)
    for name, sub in command.commands.items():  # pyright: ignore[reportAttributeAccessIssue] - it is a group
        printed = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "250", "NO_COLOR": "1"}).stdout
        for text in [option.help for option in sub.params if getattr(option, "help", None)]:
            assert text.replace("\\[", "[") in printed


def test_the_shell_completes_commands(tmp_path: Path) -> None:
    script = "import sys; sys.argv = ['cgrpo']; from customized_grpo.cli.main import main; main()"
    asked = {"_CGRPO_COMPLETE": "complete_bash", "COMP_WORDS": "cgrpo pro", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=ENVIRONMENT | asked, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["probe"], done.stderr


def test_a_packaged_recipe_goes_by_name() -> None:
    run = partial(CliRunner().invoke, cli.app)
    printed = run(["config", "toyworld/early"]).stdout
    assert printed == run(["config", str(RECIPES / "toyworld" / "early.yaml")]).stdout
    assert "use: raw_sum" in printed
    assert "toyworld/early" in run(["config", "--help"], env={"COLUMNS": "250"}).stdout
    error = run(["train", "toyworld/erly"]).exception
    assert str(error).endswith("config --help` names them). Did you mean 'toyworld/early'?")


def test_a_reward_that_exits_fails_the_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def leave(images, examples):\n    raise SystemExit\n")
    words = ["rewards={prompt: {use: ClipReward, path: 'toyworld:clip'}, identity: {use: 'mine:leave'}}"]
    text = cgrpo("train", *SMALL, *words, "output=run", "evaluation.examples=0", cwd=tmp_path, expect=2)
    assert "error: The reward mine:leave called sys.exit(None); raise an exception instead." in text
    assert "Traceback" not in text
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("said", ["The reward mine:slow was interrupted.", ""])
def test_an_interrupt_is_one_sentence_and_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], said: str
) -> None:
    app = typer.Typer()

    @app.command()
    def interrupted() -> None:
        raise KeyboardInterrupt(*[said] * bool(said))

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["cgrpo"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err.split("error: ")[-1].strip() == (said or "Interrupted.")


@pytest.mark.parametrize(("rank", "shared", "told"), [("0", True, True), ("1", True, False), ("1", False, True)])
def test_what_all_processes_raise_is_told_once(
    rank: str, shared: bool, told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**options: object) -> None:
        error = UserError("The judge is gone; mend it.")
        error.shared = shared
        raise error

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(sys, "argv", ["cgrpo", "train"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert ("The judge is gone" in capsys.readouterr().err) == told
