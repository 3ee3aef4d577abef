"""Rewards for another process: numpy only, some of them ill-behaved. `mark` is a file that remembers the first call."""

import os
import subprocess
import sys
import time
from pathlib import Path


def rivals(images, examples):
    """How many images of its example an image came with."""
    return [sum(other is example for other in examples) for example in examples]


def brightness(images, examples):
    return images.mean((1, 2, 3))


def everything(images, examples):
    """Depends on all that must arrive: pixels, prompt, subject, id, kind, every reference and mask, the target."""
    return [
        float(image[0, 0, 0]) * 255
        + 1000 * len(example.prompt + example.subject + example.id + example.kind)
        + sum(reference.getpixel((0, 0))[2] for reference in example.references) * 1e-3
        + sum(-1 if mask is None else mask.getpixel((0, 0)) for mask in example.masks) * 1e5
        + (example.target.getpixel((0, 0))[1] * 1e-1 if example.target else -7)
        for image, example in zip(images, examples, strict=True)
    ]


def some_nan(images, examples):
    return [float("nan") if n % 2 else float("inf") if n % 3 else 0.5 for n in range(len(images))]


def fails(images, examples):
    raise RuntimeError("out of memory, say")


def wrong_shape(images, examples):
    return 1.0


class Batches:
    """Scores an image by the number of images in its request."""

    def __init__(self, extra=0.0):
        self.extra = extra

    def __call__(self, images, examples):
        return [len(images) + self.extra] * len(images)


def _first_time(mark):
    path = Path(mark)
    first = not path.exists()
    path.touch()
    return first


def crashes_once(images, examples, mark):
    if _first_time(mark):
        os._exit(3)
    return brightness(images, examples)


def hangs_once(images, examples, mark):
    if _first_time(mark):
        time.sleep(60)
    return brightness(images, examples)


def fails_once(images, examples, mark):
    if _first_time(mark):
        raise RuntimeError("once")
    return brightness(images, examples)


def crashes(images, examples):
    sys.stdout.write("this is the end\n")
    sys.stdout.flush()
    os._exit(3)


class CannotLoad:
    def __init__(self):
        raise FileNotFoundError("no weights here")


class DiesLoading:
    def __init__(self):
        sys.stdout.write("segmentation fault, say\n")
        sys.stdout.flush()
        os._exit(9)


class HasChild:
    """Starts a process of its own and writes down both."""

    def __init__(self, pids):
        child = subprocess.Popen(["sleep", "300"])
        Path(pids).write_text(f"{os.getpid()} {child.pid}")

    def __call__(self, images, examples):
        return brightness(images, examples)


class HasChildrenElsewhere:
    """Starts processes in sessions of their own, one of them without a parent, and writes them down."""

    def __init__(self, pids):
        own = subprocess.Popen(["sleep", "300"], start_new_session=True)
        script = "import subprocess; print(subprocess.Popen(['sleep', '300'], start_new_session=True, stdout=2).pid)"
        orphan = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True, text=True).stdout
        Path(pids).write_text(f"{os.getpid()} {own.pid} {orphan}")

    def __call__(self, images, examples):
        os._exit(3)
