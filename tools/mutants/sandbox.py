"""Run the mirrored tests of a file on a mutant, in a copy of the project and a process of their own."""

import compileall
import contextlib
import gc
import hashlib
import importlib
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

from generate import PACKAGE, ROOT

ALSO = {
    "train/update.py": ["tests/train/test_trainer.py"],
    "train/trainer.py": ["tests/train/test_update.py"],
    "train/objectives/grpo.py": ["tests/train/test_update.py", "tests/train/test_trainer.py"],
}
"""Tests of a file beside the mirrored ones."""
PLUGINS = ("no:cacheprovider", "pytest_timeout", "_hypothesis_pytestplugin")
OPTIONS = ["-x", "-q", "-rfE", "--assert=plain", *(f"-p{name}" for name in PLUGINS), "--hypothesis-profile=mutants"]


def tests_of(file: str) -> list[str]:
    return [Path("tests", file).with_name(f"test_{Path(file).name}").as_posix(), *ALSO.get(file, [])]


def state(file: str, root: Path = ROOT) -> str:
    """Fingerprint of the file and its tests: with another one, a result holds no longer."""
    digest = hashlib.sha256()
    for path in [PACKAGE / file, *tests_of(file), "tests/conftest.py", "tests/fakes.py"]:
        digest.update((root / path).read_bytes())
    return digest.hexdigest()[:12]


class Sandbox:
    """A copy of source and tests, and a process that has imported what the tests need from outside the project.

    Every run is forked from it, so that a mutant costs as much as its tests do. Processes that a test starts see the
    mutant too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.output, self.tries = folder.resolve(), folder.resolve() / "output.txt", 0
        self.baseline: dict[str, float] = {}
        for name in ("src", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        compileall.compile_dir(folder, quiet=2)

    def run(self, file: str, code: str) -> dict:
        """What came of the tests: {"outcome": killed, timeout or survived, "seconds" of processor time, "by": a test}.

        Raises:
            RuntimeError: if the tests fail without the mutant.
        """
        if file not in self.baseline:
            found = self._fork(file, 600)
            if found["outcome"] != "survived":
                tail = self.output.read_text(encoding="utf-8")[-2000:]
                raise RuntimeError(f"Without a mutant {' '.join(tests_of(file))} gave {found}:\n{tail}")
            for name in (self.folder / "modules.txt").read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
            gc.freeze()  # so that a child neither looks through nor copies what it shares
            self.baseline[file] = self._fork(file, 600)["seconds"]
        path = self.folder / PACKAGE / file
        original, self.tries = path.read_bytes(), self.tries + 1
        try:
            path.write_text(code, encoding="utf-8")
            os.utime(path, (self.tries, self.tries))  # never the time of a compiled file
            return self._fork(file, 3 * self.baseline[file] + 5)
        finally:
            path.write_bytes(original)

    def _fork(self, file: str, limit: float) -> dict:
        """Run the tests in a child: `limit` is in seconds of processor time, because the machine may be busy."""
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            self._test(file, math.ceil(limit))
        ended = False
        try:
            while not ended and time.monotonic() - started < 20 * limit:
                ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
                time.sleep(0.01)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # with whatever the tests started
        _, status, usage = os.wait4(child, 0)
        seconds = round(usage.ru_utime + usage.ru_stime, 2)
        if not ended or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)):
            return {"outcome": "timeout", "seconds": seconds}
        if status == 0:
            return {"outcome": "survived", "seconds": seconds}
        failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", self.output.read_text(encoding="utf-8"), re.MULTILINE)
        return {"outcome": "killed", "seconds": seconds, "by": failed[1] if failed else "the process ended"}

    def _test(self, file: str, limit: int) -> None:
        """In the child, which it ends."""
        code = 70
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
            output = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(self.folder)
            sys.path.insert(0, str(self.folder / "src"))
            os.environ |= {"PYTHONPATH": str(self.folder / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
            os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
            sys.dont_write_bytecode = True
            import hypothesis
            import pytest

            phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
            hypothesis.settings.register_profile(
                "mutants", derandomize=True, database=None, deadline=None, phases=phases
            )
            code = int(pytest.main([*OPTIONS, *tests_of(file)]))
            own = {n for n, m in list(sys.modules.items()) if str(self.folder) in str(getattr(m, "__file__", ""))}
            if code == 0 and "customized_grpo" not in own:
                print("ERROR another copy of the package was imported", flush=True)
                code = 71
            others = (n for n in sys.modules if n not in own and not n.startswith("customized_grpo"))
            (self.folder / "modules.txt").write_text("\n".join(others), encoding="utf-8")
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
