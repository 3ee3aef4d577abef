"""Reports: one self-contained HTML file for a run, with its plots as SVG and PNG beside it.

`run` and `remarks` say what it contains, `customized_grpo.page` how it looks.
"""

from customized_grpo.studies.report.run import write_report

__all__ = ["write_report"]
