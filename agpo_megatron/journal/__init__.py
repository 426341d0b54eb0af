"""Durable record of samples and steps: resume, replay, inspection and audit all read these files."""

from agpo_megatron.journal.reader import JournalReader
from agpo_megatron.journal.records import JournalError, SampleRef, StepRecord, StepRow
from agpo_megatron.journal.writer import Journal

__all__ = ["Journal", "JournalError", "JournalReader", "SampleRef", "StepRecord", "StepRow"]
