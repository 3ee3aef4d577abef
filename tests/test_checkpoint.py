from pathlib import Path

import pytest
import torch

import fakes
from customized_grpo import checkpoint
from customized_grpo.checkpoint import TrainingState
from customized_grpo.errors import UserError


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
        [torch.get_rng_state()],
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
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iteration-000002", "iteration-000003"]


@pytest.mark.parametrize("full", [OSError(28, "No space left on device"), RuntimeError("file write failed")])
def test_a_full_disk_is_one_sentence_and_leaves_the_last_good_one(tmp_path: Path, monkeypatch, full) -> None:
    policy = fakes.LinearPolicy()
    good = checkpoint.save(tmp_path, state(policy), policy, "")

    def fail(*args, **kwargs) -> None:
        raise full

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match=r"iteration-000004' could not be written \(.*MiB are free\); make room"):
        checkpoint.save(tmp_path, state(policy, 4), policy, "")
    assert list(tmp_path.iterdir()) == [good], "the draft gives its room back"
    assert checkpoint.load(good).iteration == 3


@pytest.mark.parametrize("name", ["trainable.safetensors", "state.json", "optimizer.pt"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path: Path, name: str, damage: str) -> None:
    policy = fakes.LinearPolicy()
    path = checkpoint.save(tmp_path, state(policy), policy, "")
    if damage == "missing":
        (path / name).unlink()
    else:
        (path / name).write_bytes((path / name).read_bytes()[:20])
    with pytest.raises(UserError, match="incomplete or damaged"):
        checkpoint.load(path)


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    policy = fakes.LinearPolicy()
    path = checkpoint.save(tmp_path, state(policy), policy, "")
    torch.save({"optimizer": Evil(), "scheduler": {}, "rng": []}, path / "optimizer.pt")
    with pytest.raises(UserError, match="incomplete or damaged"):
        checkpoint.load(path)
    assert not (tmp_path / "ran").exists()
