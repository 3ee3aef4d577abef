import pytest
from PIL import Image

from customized_grpo.data import JsonlDataset
from customized_grpo.data.importers import import_folder
from customized_grpo.data.splits import split_manifest
from customized_grpo.errors import UserError


@pytest.fixture
def manifest(tmp_path):
    for number in range(7):
        (tmp_path / f"dog{number}").mkdir()
        Image.new("RGB", (8, 4), (number, 0, 0)).save(tmp_path / f"dog{number}" / "0.png")
    return import_folder(tmp_path, tmp_path / "data.jsonl", ["a {subject}", "a red {subject}"]).manifest


def held(path):
    train, rest = JsonlDataset(path).held_out()
    assert not set(train.subjects) & set(rest.subjects)
    assert len(train) + len(rest) == 14
    return set(rest.subjects)


def test_folds_hold_out_every_subject_once(manifest):
    folds = []
    for number in (1, 2, 3):
        output = manifest.parent / "folds" / f"{number}.jsonl"
        counts = split_manifest(manifest, output, fold=(number, 3))
        folds.append(held(output))
        assert counts == (7 - len(folds[-1]), len(folds[-1]))
    assert sorted(map(len, folds)) == [2, 2, 3]
    assert set.union(*folds) == set(JsonlDataset(manifest.parent / "folds" / "1.jsonl").subjects)
    assert len(set.union(*folds)) == 7


def test_a_share_of_the_subjects_is_held_out_by_the_seed(manifest):
    found = []
    for number, seed in enumerate((0, 0, 1)):
        output = manifest.with_name(f"{number}.jsonl")
        assert split_manifest(manifest, output, share=0.4, seed=seed) == (4, 3)
        found.append(held(output))
    assert found[0] == found[1] != found[2]
    assert split_manifest(manifest, manifest.with_name("least.jsonl"), share=0) == (6, 1)


def test_what_cannot_be_split(manifest):
    new = manifest.with_name("new.jsonl")
    with pytest.raises(UserError, match=r"has 7 subjects, of which 8 folds cannot be made; add subjects or use fewer"):
        split_manifest(manifest, new, fold=(1, 8))
    for options in ({"share": 1.0}, {"fold": (1, 1)}):
        with pytest.raises(UserError, match="none is left to train on"):
            split_manifest(manifest, new, **options)
    manifest.write_text(manifest.read_text().splitlines()[0])
    with pytest.raises(UserError, match="has 1 subject, of which some to hold out cannot be made; add subjects"):
        split_manifest(manifest, new)
    with pytest.raises(UserError, match="exists already"):
        split_manifest(manifest, manifest)
