"""Exports the policy as one Hugging Face folder, whatever the layout: every stage streams to rank 0, which writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from agpo_megatron.conversion.hf_checkpoint import read_config
from agpo_megatron.conversion.hf_writer import write_hf_checkpoint
from agpo_megatron.policy.parallel import Layout
from agpo_megatron.policy.policy import Policy


def export_hf(policy: Policy, folder: Path, initial_weights: Path) -> None:
    """Write the policy in its own dtype with config and tokenizer of ``initial_weights``. Collective; atomic.

    Raises ConversionError when the folder cannot be written.
    """
    layout = policy.layout
    tensors = policy.named_hf_tensors()
    if layout.rank == 0:
        arriving = (
            pair
            for stage in range(1, layout.pp)
            for pair in receive(layout, source_of(layout, stage))
        )
        write_hf_checkpoint(
            folder,
            read_config(initial_weights),
            (pair for part in (tensors, arriving) for pair in part),
            source_dir=initial_weights,
            overwrite=True,
        )
        return
    for name, tensor in tensors:
        if layout.publishes:
            header = (name, tuple(tensor.shape), tensor.dtype)
            dist.send_object_list([header], 0, group=layout.control_group)
            dist.send(tensor.contiguous().cpu(), 0, group=layout.control_group)
    if layout.publishes:
        dist.send_object_list([None], 0, group=layout.control_group)


def source_of(layout: Layout, stage: int) -> int:
    """Compute the global rank of a stage's TP0, CP0, DP0 (rank order: tp-cp-ep-dp-pp)."""
    return stage * (layout.world // layout.pp)


def receive(layout: Layout, source: int) -> Iterator[tuple[str, Tensor]]:
    """Receive what ``source`` sends, one tensor at a time, until it sends None in place of a header."""
    while True:
        header: list[Any] = [None]
        dist.recv_object_list(header, source, group=layout.control_group)
        if header[0] is None:
            return
        name, shape, dtype = header[0]
        tensor = torch.empty(shape, dtype=dtype)
        dist.recv(tensor, source, group=layout.control_group)
        yield name, tensor
