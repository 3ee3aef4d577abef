"""Damaged image files and manifests, which must be read or refused in one sentence: `make fuzz`.

    python tools/fuzz.py --count 20000 --seed 0 [--keep FOLDER]

Every file is a small valid one in which bytes were changed, cut, doubled or replaced by those of another. A file that
raises anything but a UserError, or takes long, is written to the folder and makes the exit status 1.
"""

import argparse
import io
import json
import random
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from customized_grpo.data import JsonlDataset
from customized_grpo.data.decode import read_mask, read_picture
from customized_grpo.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "ICO")
MODES = ("RGB", "RGBA", "L", "P", "I;16", "F")
SLOW = 30.0
"""Seconds after which a file counts as a failure."""


def seeds() -> dict[str, list[bytes]]:
    """Valid files by format: images of several modes, with EXIF data where the format has it, and manifests."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    exif.get_ifd(0x8769)[0x9003] = "2024:01:01 00:00:00"
    found: dict[str, list[bytes]] = {}
    for kind in FORMATS:
        packed = ("tiff_lzw", "tiff_deflate", "jpeg", "packbits") if kind == "TIFF" else ()
        for options in ({}, {"exif": exif}, *({"compression": name} for name in packed)):
            for mode in MODES:
                image, file = Image.new(mode, (24, 16)) if mode in ("I;16", "F") else _photo(mode), io.BytesIO()
                try:
                    image.save(file, kind, **options)
                except (OSError, ValueError, KeyError):  # the format has no such mode
                    continue
                found.setdefault(kind, []).append(file.getvalue())
    line = {"prompt": "a dog", "references": ["0.png"], "masks": [None], "mask_labels": [1], "split": "eval"}
    text = "".join(json.dumps({"id": name, **line}, ensure_ascii=False) + "\n" for name in ("a", "\xe4\u2028", "3"))
    found["manifest"] = [text.encode(encoding) for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32")]
    return found


def _photo(mode: str) -> Image.Image:
    return Image.radial_gradient("L").resize((24, 16)).convert(mode)


def mutants(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """(kind, content) of `count` damaged files, all kinds in turn."""
    draw, valid = random.Random(seed), seeds()
    kinds = list(valid)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        yield kind, _mutated(draw.choice(valid[kind]), draw.choice(valid[draw.choice(kinds)]), draw)


def _mutated(content: bytes, other: bytes, draw: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        width = draw.choice((1, 1, 2, 4))
        at = draw.randrange(64) if draw.random() < 0.3 else draw.randrange(len(data) + 1)  # the head has the sizes
        what = draw.choice(("bit", "random", "extreme", "cut", "double", "splice", "drop"))
        if what == "bit" and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif what == "random":
            data[at : at + width] = draw.randbytes(width)
        elif what == "extreme":
            data[at : at + width] = draw.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * width
        elif what == "cut" and draw.random() < 0.3:
            del data[at:]
        elif what == "double":
            data[at:at] = data[at : at + draw.randrange(64)]
        elif what == "splice":
            data[at : at + 8] = other[at : at + draw.randrange(64)]
        elif what == "drop":
            del data[at : at + width]
    return bytes(data)


def check(kind: str, content: bytes, folder: Path) -> str:
    """What is wrong with how a file is read; "" if it is read, or refused as it should be."""
    path, started = folder / ("data.jsonl" if kind == "manifest" else "file"), time.monotonic()
    path.write_bytes(content)
    for read in (JsonlDataset,) if kind == "manifest" else (read_picture, lambda path: read_mask(path, (24, 16))):
        try:
            read(path)
        except UserError as error:
            if "\n" in str(error):
                return f"the sentence has several lines: {error}"
        except Exception:
            return traceback.format_exc()
    seconds = time.monotonic() - started
    return f"it takes {seconds:.1f} s" if seconds > SLOW else ""


def main() -> int:
    parser = argparse.ArgumentParser(description="Read damaged image files and manifests.")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"))
    settings = parser.parse_args()
    failed, kinds, started = 0, Counter[str](), time.monotonic()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        Image.new("RGB", (24, 16)).save(Path(folder) / "0.png")
        for number, (kind, content) in enumerate(mutants(settings.count, settings.seed)):
            kinds[kind] += 1
            if wrong := check(kind, content, Path(folder)):
                failed += 1
                settings.keep.mkdir(parents=True, exist_ok=True)
                (settings.keep / f"{settings.seed}-{number}.{kind.lower()}").write_bytes(content)
                print(f"file {number} ({kind}): {wrong}")
    print(f"{settings.count} files in {time.monotonic() - started:.0f} s, {failed} failed; {dict(kinds)}")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
