"""The smallest study: it has a measurement, a finding and a page of its own; everything else is shared."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from customized_grpo import page
from customized_grpo.store import Folder
from customized_grpo.store.scores import Estimate, estimate

SIZES, SUBJECTS = (8, 16, 32), ("dog", "cat", "vase")


class Study(Folder):
    KIND, MARKER, INFO, COMMAND = "contrast", "contrast.json", "contrast.json", "python contrast.py"


def contrast(subject: str, size: int) -> float:
    image = np.random.default_rng([len(subject), size]).random((size, size))
    return float(image.std() / size)


def study(path: Path, console: Console, measure=contrast) -> dict[int, Estimate]:
    folder = Study(path)
    with folder.working({"sizes": SIZES, "subjects": SUBJECTS}, {"command": ["python", "contrast.py"]}):
        done = {(row["subject"], row["size"]) for row in folder.rows("scores.jsonl", subject=str, size=int)}
        for key in [(subject, size) for subject in SUBJECTS for size in SIZES]:
            if key not in done:
                folder.append("scores.jsonl", {"subject": key[0], "size": key[1], "contrast": measure(*key)})
        rows = folder.rows("scores.jsonl", contrast=float)
        found = {s: estimate(np.array([r["contrast"] for r in rows if r["size"] == s]), SUBJECTS) for s in SIZES}
        table = page.table([(str(size), {"contrast": page.Plain(*found[size])}) for size in SIZES], first="size")
        sections = [page.Section("Sizes", [table], brief=True), page.Section("Origin", page.origin(folder.facts(), []))]
        answer = "Large images have less contrast." if found[32].high < found[8].low else "Undecided."
        page.present(console, page.Page("Study", "contrast", answer, sections=sections), path)
    return found


def test_it_resumes_after_a_kill_and_is_shown_everywhere(tmp_path: Path) -> None:
    def killed_in_the_fifth(subject: str, size: int) -> float:
        if (subject, size) == ("cat", 16):
            raise KeyboardInterrupt
        return contrast(subject, size)

    with pytest.raises(KeyboardInterrupt):
        study(tmp_path / "study", Console(quiet=True), killed_in_the_fifth)
    assert Study(tmp_path / "study").status == "interrupted"
    measured, out = [], io.StringIO()
    found = study(tmp_path / "study", Console(file=out), lambda *key: measured.append(key) or contrast(*key))
    assert measured == [("cat", 16), ("cat", 32), *(("vase", size) for size in SIZES)]
    assert found == study(tmp_path / "whole", Console(quiet=True))
    assert Study(tmp_path / "study").status == "finished"
    for text in (out.getvalue(), *((tmp_path / "study" / f"report.{kind}").read_text() for kind in ("md", "html"))):
        assert "Large images have less contrast." in text
        assert page.formats.number(found[16].value) in text
