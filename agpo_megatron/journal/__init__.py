"""Durable record of samples and batches, which resume, replay, inspection and audit read."""

from agpo_megatron.journal.blocks import Block, JournalError
from agpo_megatron.journal.reader import JournalReader
from agpo_megatron.journal.records import BatchRecord, JournaledGroup
from agpo_megatron.journal.verdicts import GuardFinding, StepVerdict
from agpo_megatron.journal.writer import Journal

__all__ = [
    "BatchRecord",
    "Block",
    "GuardFinding",
    "Journal",
    "JournalError",
    "JournalReader",
    "JournaledGroup",
    "StepVerdict",
]
