"""Reports of runs: one self-contained HTML file, with its plots as SVG and PNG beside it.

`run` and `remarks` decide what it contains, `customized_grpo.page` how it looks.
"""

from customized_grpo.studies.report.run import write_report

__all__ = ["write_report"]
