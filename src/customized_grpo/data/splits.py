"""Manifests with some subjects held out."""

import random
from pathlib import Path

from customized_grpo.data.examples import JsonlDataset
from customized_grpo.data.importers import check_free, rebased, write_manifest
from customized_grpo.errors import UserError

ENOUGH = 10
"""Held-out subjects below which an interval over subjects says little."""


def split_manifest(
    manifest: str | Path, output: str | Path, *, share: float = 0.1, fold: tuple[int, int] | None = None, seed: int = 0
) -> tuple[int, int]:
    """Write another manifest in which every example has a split: "eval" for those of some subjects, else "train".

    Args:
        manifest: to read; splits that it has are replaced.
        output: the manifest to write.
        share: of the subjects to hold out, at least one.
        fold: (i, k), from (1, k) to (k, k): hold out the i-th of k parts of the subjects instead.
        seed: of the order of the subjects.

    Returns:
        The numbers of subjects for training and held out.

    Raises:
        UserError: if the output exists, or there are too few subjects.
    """
    dataset, path = JsonlDataset(manifest), check_free(output)
    subjects = sorted(set(dataset.subjects))
    random.Random(seed).shuffle(subjects)
    number, parts = fold or (1, 1)
    if len(subjects) < max(2, parts):
        raise UserError(
            f"'{manifest}' has {len(subjects)} subject{'s' if len(subjects) > 1 else ''}, of which "
            f"{f'{parts} folds' if fold else 'some to hold out'} cannot be made; add subjects"
            f"{' or use fewer folds' if fold else ''}."
        )
    chosen = subjects[number - 1 :: parts] if fold else subjects[: max(1, round(share * len(subjects)))]
    if len(chosen) == len(subjects):
        raise UserError("All subjects would be held out, and none is left to train on; hold out fewer.")
    records = [
        rebased(record, dataset.path.parent, path).model_copy(
            update={"split": "eval" if subject in chosen else "train"}
        )
        for record, subject in zip(dataset.records, dataset.subjects, strict=True)
    ]
    write_manifest(path, records)
    return len(subjects) - len(chosen), len(chosen)
