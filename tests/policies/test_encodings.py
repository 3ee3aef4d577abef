from pathlib import Path

import pytest
import torch

from customized_grpo import FluxKontextPolicy
from customized_grpo.errors import UserError
from customized_grpo.policies.encodings import EncodingCache, digest

from . import tiny


def test_the_least_recently_used_make_room():
    cache = EncodingCache(limit=3 * 8)
    made: list[str] = []

    def row(key: str):
        return cache.get(key, lambda: made.append(key) or {"x": torch.zeros(2)})

    for key in "abcadb":  # d pushes b out, because a was used again
        row(key)
    assert "".join(made) == "abcdb"
    assert cache.bytes == 3 * 8
    cache.get("large", lambda: {"x": torch.zeros(100)})
    assert "large" not in cache
    assert cache.bytes == 0


def test_a_folder_keeps_the_rows_for_another_process(tmp_path: Path) -> None:
    made: list[str] = []

    def row(folder: Path) -> torch.Tensor:
        def make() -> dict[str, torch.Tensor]:
            made.append(folder.name)
            return {"x": torch.arange(6, dtype=torch.bfloat16).view(2, 3).T}

        return EncodingCache(0, folder).get(("text", "a dog", (b"1", (4, 4))), make)["x"]

    first, again = row(tmp_path / "one"), row(tmp_path / "one")
    assert torch.equal(first, again)
    assert made == ["one"]
    row(tmp_path / "two")
    next((tmp_path / "one").iterdir()).write_bytes(b"damaged")
    assert torch.equal(row(tmp_path / "one"), first)
    assert made == ["one", "two", "one"]


def test_another_policy_with_the_same_encoders_encodes_nothing(tmp_path: Path, monkeypatch) -> None:
    def policy(**settings) -> FluxKontextPolicy:
        return FluxKontextPolicy(tiny.kontext_pipeline(), encodings=tmp_path, device="cpu", **settings)

    first, example = policy(), tiny.example()
    expected, other = first.encode([example]), policy()
    for name in ("_encode_text", "_encode_references"):
        monkeypatch.setattr(other, name, lambda *given: pytest.fail("it is encoded again"))
    assert all(torch.equal(expected[name], value) for name, value in other.encode([example]).items())
    folders = {made._cache.folder for made in (first, other, policy(max_text_tokens=4))}
    changed = tiny.kontext_pipeline()
    changed.text_encoder_2.shared.weight.data.view(-1)[0] += 1
    folders.add(FluxKontextPolicy(changed, encodings=tmp_path, device="cpu")._cache.folder)
    assert len(folders) == 3, "other settings and other weights have encodings of their own"


def test_a_file_is_no_folder_of_encodings(tmp_path: Path) -> None:
    (tmp_path / "notes.md").touch()
    with pytest.raises(UserError, match=r"because '.*notes\.md' is a file"):
        FluxKontextPolicy(tiny.kontext_pipeline(), encodings=tmp_path / "notes.md", device="cpu")


def test_equal_pictures_have_equal_digests():
    assert digest(tiny.picture(seed=1)) == digest(tiny.picture(seed=1))
    assert digest(tiny.picture(seed=1)) != digest(tiny.picture(seed=2))
    assert digest(tiny.picture((8, 32))) != digest(tiny.picture((32, 8)))
