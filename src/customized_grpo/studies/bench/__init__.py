"""The field's benchmarks: `cgrpo bench`. Pictures by a protocol, scores with intervals, an oracle line, a report."""

from customized_grpo.studies.bench.plan import BenchSettings, make_plan
from customized_grpo.studies.bench.protocols import PROTOCOLS, Metric, Protocol, find_protocol
from customized_grpo.studies.bench.record import Bench, BenchFolder, read_bench

__all__ = [
    "PROTOCOLS",
    "Bench",
    "BenchFolder",
    "BenchSettings",
    "Metric",
    "Protocol",
    "find_protocol",
    "make_plan",
    "read_bench",
]
