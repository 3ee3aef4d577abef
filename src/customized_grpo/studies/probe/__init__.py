"""When along the denoising trajectory is each reward decided? `cgrpo probe` measures it, on any policy and rewards.

`measure` branches trajectories, `record` keeps what was measured, `findings` draws the conclusions with intervals,
`report` writes them down, and `run_probe` does all of it in a folder.
"""

from customized_grpo.studies.probe.findings import Findings, Verdict, conclude, fitted_weights
from customized_grpo.studies.probe.measure import Branches, Probe, ProbeSettings, choose, measure_all
from customized_grpo.studies.probe.record import ProbeFolder
from customized_grpo.studies.probe.report import write_report
from customized_grpo.studies.probe.run import run_probe

__all__ = [
    "Branches",
    "Findings",
    "Probe",
    "ProbeFolder",
    "ProbeSettings",
    "Verdict",
    "choose",
    "conclude",
    "fitted_weights",
    "measure_all",
    "run_probe",
    "write_report",
]
