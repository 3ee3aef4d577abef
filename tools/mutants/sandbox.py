"""Run the mirrored tests of a file on a mutant, in a copy of the project and a process of their own."""

import compileall
import contextlib
import gc
import hashlib
import importlib
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

from generate import PACKAGE, ROOT

ALSO = {"update.py": ["tests/test_trainer.py"], "trainer.py": ["tests/test_update.py"]}
"""Tests of a file beside the mirrored ones."""
PLUGINS = ("no:cacheprovider", "pytest_timeout", "_hypothesis_pytestplugin")
OPTIONS = ["-x", "-q", "--assert=plain", *(f"-p{name}" for name in PLUGINS), "--hypothesis-profile=mutants"]


def tests_of(file: str) -> list[str]:
    mirrored = Path("tests", file).with_name(f"test_{Path(file).name}").as_posix()
    return [test for test in [mirrored, *ALSO.get(file, [])] if (ROOT / test).is_file()]


def state(file: str, root: Path = ROOT) -> str:
    """Fingerprint of the file and its tests: with another one, a result holds no longer."""
    digest = hashlib.sha256()
    for path in [PACKAGE / file, *tests_of(file), "tests/conftest.py", "tests/fakes.py"]:
        digest.update((root / path).read_bytes())
    return digest.hexdigest()[:12]


class Watch:
    """A pytest plugin that remembers the first failure."""

    failed = ""

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.failed = self.failed or f"{report.nodeid} cannot be imported"


class Sandbox:
    """A copy of source and tests, and a process that has imported what the tests need from outside the project.

    Every run is forked from it, so that a mutant costs as much as its tests do. Processes that a test starts see the
    mutant too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.tries = folder.resolve(), 0
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
                tail = (self.folder / "output.txt").read_text(encoding="utf-8")[-2000:]
                raise RuntimeError(f"Without a mutant {' '.join(tests_of(file))} gave {found}:\n{tail}")
            for name in found["modules"]:
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
            gc.freeze()  # so that a child neither looks through nor copies what it shares
            self.baseline[file] = self._fork(file, 600)["seconds"]
        path = self.folder / PACKAGE / file
        original, self.tries = path.read_bytes(), self.tries + 1
        try:
            path.write_text(code, encoding="utf-8")
            os.utime(path, (self.tries, self.tries))  # never the time of a compiled file
            found = self._fork(file, 3 * self.baseline[file] + 5)
        finally:
            path.write_bytes(original)
        return {key: value for key, value in found.items() if key != "modules"}

    def _fork(self, file: str, limit: float) -> dict:
        """Run the tests in a child: `limit` is in seconds of processor time, because the machine may be busy."""
        started, said = time.monotonic(), self.folder / "said.json"
        said.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            self._test(file, said, math.ceil(limit))
        ended = False
        while not ended and time.monotonic() - started < 20 * limit:
            ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # with whatever the tests started
        _, status, usage = os.wait4(child, 0)
        seconds = round(usage.ru_utime + usage.ru_stime, 2)
        if not ended or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)):
            return {"outcome": "timeout", "seconds": seconds}
        told = json.loads(said.read_text(encoding="utf-8")) if said.is_file() else {"by": "the process ended"}
        return {"outcome": "killed" if status else "survived", "seconds": seconds, **told}

    def _test(self, file: str, said: Path, limit: int) -> None:
        """In the child, which it ends."""
        code = 70
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
            output = os.open(self.folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
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
            watch = Watch()
            code = int(pytest.main([*OPTIONS, *tests_of(file)], plugins=[watch]))
            own = {n for n, m in list(sys.modules.items()) if str(self.folder) in str(getattr(m, "__file__", ""))}
            if code == 0 and "customized_grpo" not in own:
                code, watch.failed = 71, "another copy of the package was imported"
            told = {"by": watch.failed or f"pytest ended with {code}"} if code else {}
            modules = [n for n in sys.modules if n not in own and not n.startswith("customized_grpo")]
            said.write_text(json.dumps({**told, "modules": modules}), encoding="utf-8")
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
