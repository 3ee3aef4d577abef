"""The benchmarks of the literature: `cgrpo bench` generates images by a protocol and scores them, with intervals."""

from customized_grpo.studies.bench.plan import BenchSettings, make_plan
from customized_grpo.studies.bench.protocols import PROTOCOLS, Metric, Protocol, find_protocol
from customized_grpo.studies.bench.record import Bench, BenchFolder, read_bench

__all__ = [
    "PROTOCOLS", "Bench", "BenchFolder", "BenchSettings", "Metric", "Protocol", "find_protocol", "make_plan",
    "read_bench",
]  # fmt: skip
