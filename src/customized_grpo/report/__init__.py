"""Reports: one self-contained HTML file for a run, with its plots as SVG and PNG beside it.

`record` reads a run folder, `intervals` says what is certain, `plots` draws numbers, `page` renders templates,
`run` puts a run's report together. Only `run` knows what a run's report contains; the others serve any report.
"""

from customized_grpo.report.run import write_report

__all__ = ["write_report"]
