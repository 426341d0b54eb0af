"""The report of a run: one HTML file from its journal, metrics and logs, also while it runs or after it died."""

from agpo_megatron.observe.report.faults import Event, Launch
from agpo_megatron.observe.report.page import make_report

__all__ = ["Event", "Launch", "make_report"]
