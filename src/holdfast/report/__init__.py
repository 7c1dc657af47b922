"""The report: one self-contained HTML file, made from a `RunResult` alone."""

from holdfast.report.html import write_report

__all__ = ["write_report"]
