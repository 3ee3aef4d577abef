"""Measure, conclude and report in a folder. After a kill it continues with the missing steps."""

from typing import Any

from rich.console import Console

from customized_grpo import page
from customized_grpo.studies.probe.findings import Findings
from customized_grpo.studies.probe.measure import Branches, Probe, measure_all
from customized_grpo.studies.probe.record import ProbeFolder, identity
from customized_grpo.studies.probe.report import analyse, show
from customized_grpo.train.trackers import provenance

QUIET = Console(quiet=True)


def run_probe(probe: Probe, folder: ProbeFolder, config: str = "", console: Console = QUIET, **about: Any) -> Findings:
    """Measure what is missing in `folder`, and write findings.json, time_weights.json and probe.html.

    Args:
        probe: to measure with.
        folder: new, or of an earlier probe of the same policy, rewards, examples and settings.
        config: the configuration as YAML, to resume with.
        console: shows progress and findings.
        about: facts of a new folder, for probe.json.

    Raises:
        UserError: if the folder is of another probe, a file in it is damaged, or a reward did not move.
    """
    with folder.working(identity(probe), {**provenance(), **about}), page.Progress(console) as progress:
        if config:
            folder.write(folder.config.name, config)
        folder.describe(steps=probe.steps, model=probe.policy.name, batch=probe.settings.batch)
        finished, total = folder.finished(), len(probe.steps) + 1
        progress("steps", len(finished), total)

        def keep(branches: Branches) -> None:
            folder.save(branches)
            finished[branches.steps] = branches
            progress("steps", len(finished), total)

        measured = measure_all(probe, finished, on_finished=keep)
        folder.describe(seconds=round(sum(branches.seconds for branches in measured), 1))
        found = analyse(folder)
        show(folder, found, console)
    return found
