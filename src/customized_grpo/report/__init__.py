"""Reports: one self-contained HTML file for a run, with its plots as SVG and PNG beside it.

`record` reads a run folder, `intervals` says what is certain, `plots` draws numbers, `page` renders templates,
`remarks` and `run` put a run's report together; the others serve any report.
"""

from customized_grpo.report.run import write_report

__all__ = ["write_report"]
