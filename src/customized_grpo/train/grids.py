"""Pictures of pictures: sample grids with captions."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from customized_grpo.data.images import png, to_pil
from customized_grpo.functional.advantages import standardize
from customized_grpo.page.images import jpeg
from customized_grpo.page.sheets import fit, grid
from customized_grpo.store import write
from customized_grpo.store.files import plain
from customized_grpo.store.run import RunFolder, iteration_files
from customized_grpo.structures import Example

if TYPE_CHECKING:
    from customized_grpo.train.evaluation import Evaluation


def save_grid(evaluation: "Evaluation", folder: Path) -> None:
    """samples/iteration-NNNNNN.png (reference | generation) and the pictures alone, for the report.

    What is right and wrong in a picture, where a metric says it, is beside it as JSON. The small pictures of the tasks
    that are not in the grid are kept of the first and of the newest evaluation alone.
    """
    if len(evaluation.images) == 0:
        return
    iteration, pictures = evaluation.scores.iteration, [to_pil(image) for image in evaluation.images]
    shown = evaluation.examples[: len(pictures)]
    rows = [[*example.references, picture] for example, picture in zip(shown, pictures, strict=True)]
    most = max(len(row) for row in rows) - 1
    headers = ["reference"] * most + [label(iteration)]
    stem = f"iteration-{iteration:06d}"
    write(folder / f"{stem}.png", png(grid(rows, headers, [example.prompt for example in shown])))
    cells = folder / "cells"
    for index, (example, picture) in enumerate(zip(shown, pictures, strict=True)):
        write(cells / f"{index:03d}-{stem}.png", png(picture))
        write(cells / f"{index:03d}-reference.png", png(fit(example.references[0])))
        write(cells / f"{index:03d}-prompt.txt", example.prompt)
    for index, content in enumerate(evaluation.small, len(pictures)):
        write(cells / f"{index:03d}-{stem}.jpg", content)
        if not (reference := cells / f"{index:03d}-reference.jpg").exists():
            write(reference, jpeg(evaluation.examples[index].references[0]))
    for index, marks in enumerate(evaluation.marks):
        if marks:
            write(cells / f"{index:03d}-{stem}.json", json.dumps(marks))
    for number, path in (found := list(iteration_files(cells, ".jpg", "*-"))):
        if found[0][0] < number < iteration:
            path.unlink()
            path.with_suffix(".json").unlink(missing_ok=True)


def save_groups(
    folder: Path, iteration: int, examples: Sequence[Example], images: Tensor, rewards: Tensor, advantages: Tensor,
    names: Sequence[str],
) -> None:  # fmt: skip
    """Whole groups of a training iteration, for the report: samples/groups/iteration-NNNNNN.json and its images.

    Args:
        folder: samples/.
        iteration: that drew them.
        examples: P.
        images: (P * G, 3, H, W), stored small.
        rewards: (P, G, K), raw.
        advantages: (P, G, S), as the update gets them.
        names: of the K rewards.
    """
    folder, stem = folder / "groups", f"iteration-{iteration:06d}"
    z = standardize(rewards).where(rewards.isfinite(), rewards)
    groups = []
    for p, example in enumerate(examples):
        generations = range(len(rewards[p]))
        files = [write(folder / f"{p}-{g}-{stem}.jpg", jpeg(to_pil(images[p * len(generations) + g])))
                 for g in generations]  # fmt: skip
        rows = [{"file": files[g].name, "rewards": rewards[p, g], "z": z[p, g], "advantages": advantages[p, g]}
                for g in generations]  # fmt: skip
        groups.append({"prompt": example.prompt, "kind": example.kind, "images": rows})
    write(folder / f"{stem}.json", json.dumps(plain({"rewards": list(names), "groups": groups})))


def copy_grid(source: Path, stem: str, folder: Path) -> None:
    """Bring what `save_grid` wrote into `source` for one evaluation into another folder."""
    wanted = [f"{stem}.png", f"cells/*-{stem}.*", "cells/*-reference.*", "cells/*-prompt.txt"]
    for path in (path for pattern in wanted for path in sorted(source.glob(pattern))):
        write(folder / path.relative_to(source), path.read_bytes())


def save_history(run: RunFolder) -> Path | None:
    """samples/over_training.png: reference | same prompt and noise at every evaluated iteration (eight at most)."""
    cells = run.samples / "cells"
    prompts = sorted(cells.glob("*-prompt.txt")) if cells.is_dir() else []
    if not prompts:
        return None
    stages = sorted({path.stem.split("-", 1)[1] for path in cells.glob("*-iteration-*.png")})
    if len(stages) > 8:
        stages = [stages[round(i * (len(stages) - 1) / 7)] for i in range(8)]
    rows, captions = [], []
    for prompt in prompts:
        index = prompt.name.split("-")[0]
        names = [f"{index}-reference.png", *(f"{index}-{stage}.png" for stage in stages)]
        rows.append([Image.open(cells / name).copy() for name in names if (cells / name).exists()])
        captions.append(prompt.read_text(encoding="utf-8"))
    target = run.samples / "over_training.png"
    headers = ["reference", *(label(int(stage.split("-")[1])) for stage in stages)]
    write(target, png(grid(rows, headers, captions)))
    return target


def label(iteration: int) -> str:
    return "base" if iteration == 0 else f"iteration {iteration}"
