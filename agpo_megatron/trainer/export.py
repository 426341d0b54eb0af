"""Exports the policy as one Hugging Face folder, whatever the layout: every stage streams to rank 0, which writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from agpo_megatron.conversion.hf_checkpoint import read_config
from agpo_megatron.conversion.hf_writer import write_hf_checkpoint
from agpo_megatron.conversion.shape import dtype_name
from agpo_megatron.policy.parallel import Layout
from agpo_megatron.policy.policy import Policy

END = b"{}"


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
            header = {"name": name, "shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype)}
            send_bytes(layout, json.dumps(header).encode())
            dist.send(tensor.contiguous().cpu(), 0, group=layout.control_group)
    if layout.publishes:
        send_bytes(layout, END)


def source_of(layout: Layout, stage: int) -> int:
    """Compute the global rank of a stage's TP0, CP0, DP0 (rank order: tp-cp-ep-dp-pp)."""
    return stage * (layout.world // layout.pp)


def send_bytes(layout: Layout, data: bytes) -> None:
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    dist.send(torch.tensor([len(data)]), 0, group=layout.control_group)
    dist.send(buffer, 0, group=layout.control_group)


def receive_bytes(layout: Layout, source: int) -> bytes:
    size = torch.zeros(1, dtype=torch.int64)
    dist.recv(size, source, group=layout.control_group)
    buffer = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(buffer, source, group=layout.control_group)
    return buffer.numpy().tobytes()


def receive(layout: Layout, source: int) -> Iterator[tuple[str, Tensor]]:
    """Receive what ``source`` sends, one tensor at a time, until its end mark."""
    while (data := receive_bytes(layout, source)) != END:
        header = json.loads(data)
        tensor = torch.empty(header["shape"], dtype=getattr(torch, header["dtype"]))
        dist.recv(tensor, source, group=layout.control_group)
        yield header["name"], tensor
