import dataclasses
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

import fakes
from customized_grpo.errors import UserError
from customized_grpo.train import checkpoint
from customized_grpo.train.checkpoint import TrainingState
from store.kills import kills


def state(policy: fakes.LinearPolicy, iteration: int = 3, ema: bool = True) -> TrainingState:
    average = {n: t + 1 for n, t in policy.trainable_state().items()} if ema else None
    optimizer = torch.optim.AdamW(policy.trainable_parameters()).state_dict()
    return TrainingState(
        iteration,
        {"samples": 7},
        optimizer,
        {"last_epoch": 2},
        policy.trainable_state(),
        average,
    )


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    policy = fakes.LinearPolicy()
    path = checkpoint.save(tmp_path, state(policy), policy, "seed: 0\n")
    loaded = checkpoint.load(path)
    assert (loaded.iteration, loaded.progress, loaded.scheduler) == (3, {"samples": 7}, {"last_epoch": 2})
    for name, tensor in policy.trainable_state().items():
        assert torch.equal(loaded.trainable[name], tensor)
        assert loaded.ema is not None
        assert torch.equal(loaded.ema[name], tensor + 1)


def test_the_adapter_holds_the_average_and_training_goes_on_without_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    policy = fakes.LinearPolicy()
    before = {n: t.clone() for n, t in policy.trainable_state().items()}
    path = checkpoint.save(tmp_path, state(policy), policy, "")
    adapter = load_file(path / "adapter" / "weights.safetensors")
    for name, tensor in policy.trainable_state().items():
        assert torch.equal(tensor, before[name])
        assert torch.equal(adapter[name], before[name] + 1)


def test_a_draft_is_no_checkpoint_and_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / ".iteration-000009.partial").mkdir()
    policy = fakes.LinearPolicy()
    for iteration in (1, 2, 3):
        checkpoint.save(tmp_path, state(policy, iteration), policy, "")
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == [f"iteration-00000{i}" for i in (1, 2, 3)]
    checkpoint.prune(tmp_path, 0)
    checkpoint.prune(tmp_path, 3)
    assert len(checkpoint.checkpoints(tmp_path)) == 3
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iteration-000002", "iteration-000003"]
    checkpoint.prune(tmp_path, 1, spare=2)
    assert len(checkpoint.checkpoints(tmp_path)) == 2
    checkpoint.prune(tmp_path, 1, spare=3)
    assert [p.name for p in tmp_path.iterdir()] == ["iteration-000003"]


def test_what_cannot_be_removed_stays_and_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs) -> None:
        raise PermissionError(13, "Permission denied")

    policy = fakes.LinearPolicy()
    for iteration in (1, 2):
        checkpoint.save(tmp_path, state(policy, iteration), policy, "")
    monkeypatch.setattr(os, "unlink", refuse)
    for _ in range(2):  # the second time there is something left to sweep away
        checkpoint.prune(tmp_path, 1)
        assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["iteration-000002"]


@pytest.mark.parametrize("full", [OSError(28, "No space left on device"), RuntimeError("file write failed")])
def test_a_full_disk_is_one_sentence_and_leaves_the_last_good_one(tmp_path: Path, monkeypatch, full) -> None:
    policy = fakes.LinearPolicy()
    good = checkpoint.save(tmp_path, state(policy), policy, "")

    def fail(*args, **kwargs) -> None:
        raise full

    monkeypatch.setattr(torch, "save", fail)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(3 * 2**20))
    with pytest.raises(UserError, match=r"iteration-000004' could not be written \(.*; 3 MiB are free\); make room"):
        checkpoint.save(tmp_path, state(policy, 4), policy, "")
    assert list(tmp_path.iterdir()) == [good], "the draft gives its room back"
    assert checkpoint.load(good).iteration == 3


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    policy = fakes.LinearPolicy()
    with pytest.raises(UserError, match=r"iteration-000003' could not be written \(.*MiB are free\)"):
        checkpoint.save(tmp_path / "file" / "checkpoints", state(policy), policy, "")


def test_saving_leaves_no_file_open(tmp_path: Path) -> None:
    def next_descriptor() -> int:
        descriptor = os.open(os.devnull, os.O_RDONLY)
        os.close(descriptor)
        return descriptor

    policy, before = fakes.LinearPolicy(), next_descriptor()
    checkpoint.save(tmp_path, state(policy), policy, "")
    assert next_descriptor() == before


@pytest.mark.parametrize(("second", "keep"), [(3, 1), (4, 1), (4, 2)])
def test_a_kill_at_any_step_of_saving_leaves_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: int, keep: int
) -> None:
    """Iteration 3 is there, then 4 or 3 again is written and the old ones are removed."""
    policy, calls = fakes.LinearPolicy(), 0
    first, then = state(policy, 3), dataclasses.replace(state(policy, second), progress={"samples": 8})

    def work() -> None:
        checkpoint.save(tmp_path, then, policy, "")
        checkpoint.prune(tmp_path, keep)

    checkpoint.save(tmp_path, first, policy, "")
    for _ in kills(monkeypatch, work):
        calls += 1
        found = checkpoint.checkpoints(tmp_path)
        loaded = [checkpoint.load(path) for path in found]
        assert [x.iteration for x in loaded] == [checkpoint.iteration_of(path) for path in found]
        assert (loaded[-1].iteration, loaded[-1].progress["samples"]) in {(3, 7), (second, 8)}
        checkpoint.verify(found[-1], lambda name: True)
        shutil.rmtree(tmp_path)
        checkpoint.save(tmp_path, first, policy, "")
    assert calls > 10
    assert checkpoint.load(checkpoint.checkpoints(tmp_path)[-1]).progress == {"samples": 8}
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [f"iteration-00000{n}" for n in sorted({3, second})][-keep:]


def test_after_a_kill_the_next_save_goes_on_as_if_nothing_had_been(tmp_path: Path, monkeypatch) -> None:
    policy = fakes.LinearPolicy()

    def work() -> None:
        checkpoint.save(tmp_path, state(policy), policy, "")
        checkpoint.prune(tmp_path, 1)

    work()
    for _ in kills(monkeypatch, work):  # each one upon what the kills before it have left
        assert checkpoint.load(checkpoint.checkpoints(tmp_path)[-1]).iteration == 3
    assert [p.name for p in tmp_path.iterdir()] == ["iteration-000003"]


FILES = ["trainable.safetensors", "ema.safetensors", "optimizer.pt", "config.yaml", "state.json"]


@pytest.mark.parametrize("name", [*FILES, "adapter/weights.safetensors"])
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path, name: str) -> None:
    policy = fakes.LinearPolicy()
    path = checkpoint.save(tmp_path, state(policy), policy, "seed: 0\n")
    whole = (path / name).read_bytes()
    every = 3 if name == "state.json" else max(1, len(whole) // 20)
    for place in {*range(0, len(whole), every), len(whole) - 1}:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        (path / name).write_bytes(flipped)
        with pytest.raises(UserError, match=r"damaged \(.*; remove that folder"):
            checkpoint.verify(path, lambda name: True)
        if name in FILES:
            with pytest.raises(UserError, match=r"damaged \(.*; remove that folder"):
                checkpoint.load(path)
    (path / name).write_bytes(whole)
    checkpoint.load(path)


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"iteration": "three"}', "[" * 9999])
def test_a_state_that_says_nothing_is_one_sentence(tmp_path: Path, text: str) -> None:
    policy = fakes.LinearPolicy()
    path = checkpoint.save(tmp_path, state(policy), policy, "")
    (path / "state.json").write_text(text)
    with pytest.raises(UserError, match="incomplete or damaged"):
        checkpoint.load(path)


def test_the_layout_of_the_state_is_no_damage(tmp_path: Path) -> None:
    policy = fakes.LinearPolicy()
    path = checkpoint.save(tmp_path, state(policy), policy, "")
    content = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(dict(reversed(content.items()))))
    assert checkpoint.load(path).iteration == 3


def test_a_checkpoint_of_an_earlier_version_has_no_checksums_and_is_read(tmp_path: Path) -> None:
    policy = fakes.LinearPolicy()
    path = checkpoint.save(tmp_path, state(policy), policy, "")
    (path / "state.json").write_text('{"iteration": 3, "samples": 7}')
    loaded = checkpoint.load(path)
    assert (loaded.iteration, loaded.progress) == (3, {"samples": 7})
    damaged = bytearray((path / "optimizer.pt").read_bytes())
    damaged[: len(damaged) // 2] = bytes(len(damaged) // 2)
    (path / "optimizer.pt").write_bytes(damaged)
    with pytest.raises(UserError, match="incomplete or damaged"):
        checkpoint.load(path)


def test_a_checkpoint_of_a_later_version_is_not_guessed_at(tmp_path: Path, monkeypatch) -> None:
    policy = fakes.LinearPolicy()
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    path = checkpoint.save(tmp_path, state(policy), policy, "")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"has format 99, and this version reads 1; use the version"):
        checkpoint.load(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path: Path, name: str, damage: str) -> None:
    policy = fakes.LinearPolicy()
    path = checkpoint.save(tmp_path, state(policy), policy, "seed: 0\n")
    if damage == "missing":
        (path / name).unlink()
    else:
        (path / name).write_bytes((path / name).read_bytes()[:-1])
    with pytest.raises(UserError, match="incomplete or damaged"):
        checkpoint.load(path)


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    policy = fakes.LinearPolicy()
    path = checkpoint.save(tmp_path, state(policy), policy, "")
    torch.save({"optimizer": Evil(), "scheduler": {}}, path / "optimizer.pt")
    (path / "state.json").write_text('{"iteration": 3}')  # as of an earlier version, without checksums
    with pytest.raises(UserError, match="incomplete or damaged"):
        checkpoint.load(path)
    assert not (tmp_path / "ran").exists()
