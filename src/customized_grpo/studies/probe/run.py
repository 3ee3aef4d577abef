"""Measure, conclude and report in a folder, going on where a kill left it."""

from collections.abc import Callable

from customized_grpo.studies.probe.findings import Findings
from customized_grpo.studies.probe.measure import Branches, Probe, measure_all
from customized_grpo.studies.probe.record import Identity, ProbeFolder
from customized_grpo.studies.probe.report import analyse, write_page
from customized_grpo.train.trackers import provenance


def run_probe(
    probe: Probe, folder: ProbeFolder, *, on_finished: Callable[[Branches], None] = lambda branches: None
) -> Findings:
    """Measure what is missing in `folder`, and write findings.json, time_weights.json and probe.html.

    Args:
        probe: what to measure.
        folder: new, or of an earlier probe of the same policy, rewards, examples and settings.
        on_finished: told of every measurement when it is on disk.

    Raises:
        UserError: if the folder is of another probe, a file in it is damaged, or a reward did not move.
    """
    folder.claim(vars(Identity.of(probe)))
    about = {} if "started" in folder.facts() else provenance()
    folder.describe(**about, steps=list(probe.steps), model=probe.policy.name, status="running")

    def keep(branches: Branches) -> None:
        folder.save(branches)
        on_finished(branches)

    measured = measure_all(probe, folder.finished(), on_finished=keep)
    seconds = round(sum(branches.seconds for branches in measured), 1)
    folder.describe(seconds=seconds)
    found = analyse(folder)
    write_page(folder, found)
    folder.finish("finished")
    return found
