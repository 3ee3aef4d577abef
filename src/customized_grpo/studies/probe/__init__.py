"""When along the denoising trajectory is each reward decided? `cgrpo probe` measures it for any policy and rewards."""

from customized_grpo.studies.probe.findings import Findings, Verdict, conclude, fitted_weights
from customized_grpo.studies.probe.measure import Branches, Probe, ProbeSettings, choose, measure_all
from customized_grpo.studies.probe.record import ProbeFolder
from customized_grpo.studies.probe.report import write_report
from customized_grpo.studies.probe.run import run_probe

__all__ = [
    "Branches", "Findings", "Probe", "ProbeFolder", "ProbeSettings", "Verdict", "choose", "conclude", "fitted_weights",
    "measure_all", "run_probe", "write_report",
]  # fmt: skip
