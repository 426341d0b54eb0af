"""Writing a Megatron checkpoint parameter by parameter, without Megatron, model or process group.

The format is ``torch_dist``: files of concatenated ``torch.save`` records and a ``.metadata`` that says what each
record is (torch.distributed.checkpoint, ``FileSystemWriter``). ``dist_checkpointing.load`` reads it in any layout.
"""

from __future__ import annotations

import io
import json
import pickle
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.utils.serialization import config as serialization

from agpo_megatron.conversion.building import FileJob, MemoryGate, Pace, open_building
from agpo_megatron.conversion.hf_writer import GATE_FLOOR, bytes_of, digest_of
from agpo_megatron.conversion.shape import DTYPES
from agpo_megatron.conversion.tables import Cut, Rule
from agpo_megatron.files import write_all
from agpo_megatron.policy.marker import FORMAT, digest, write_marker
from agpo_megatron.policy.stored import StorePlan, pieces_of

OBJECTS = "__objects.distcp"
"""File of what is no tensor."""
COMMON = "common_state/shard_0_1"
RECORD_OVERHEAD = 2048
"""Bytes of a ``torch.save`` record beyond its tensor, about."""

Load = Callable[[str], Tensor]
Entry = list[Any]
"""A record: [key, offset in the global tensor or None, size or None, position in the file, length]."""


def write_weights(
    target: Path,
    plan: StorePlan,
    load: Load,
    identity: Mapping[str, Any],
    extra: Mapping[str, Any],
    put_beside: Callable[[Path], None],
    pace: Pace,
) -> None:
    """Write the checkpoint ``target``; it appears complete or not at all, and takes up an interrupted attempt.

    ``load``: Hugging Face name -> full tensor. ``identity``: what is converted (with ``plan``: whether an earlier
    attempt was the same). ``extra``: JSON values kept in the marker. ``put_beside``: puts more files into the folder.
    Raises ConversionError when ``target`` exists, the disk is full, or ``load`` refuses.
    """
    largest = max(plan.nbytes(rule) for rule in plan.rules)
    gate = MemoryGate(max(2 * largest, GATE_FLOOR))
    files = {
        name: FileJob(
            sum(plan.nbytes(r) for r in rules) + RECORD_OVERHEAD * len(rules) * plan.sizes.tp,
            partial(_write_rules, plan, rules, load, gate),
        )
        for name, rules in plan.files.items()
    }
    layout = {name: [rule.megatron for rule in rules] for name, rules in plan.files.items()}
    sizes = {"tp": plan.sizes.tp, "pp": plan.sizes.pp, "vpp": plan.sizes.vpp, "ep": plan.sizes.ep}
    identity = {**identity, **sizes, "dtype": plan.dtype, "files": digest_of(layout)}
    with open_building(target, identity) as building, _without_zip_checksums():
        written = building.write(files, pace)
        folder = building.folder
        written[OBJECTS] = _write_objects(folder / OBJECTS, plan)
        (folder / ".metadata").write_bytes(pickle.dumps(_metadata(plan, written)))
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (folder / "metadata.json").write_text(json.dumps(config), encoding="utf-8")
        put_beside(folder)
        digests = {name: record["digest"] for name, record in written.items()}
        for path in folder.iterdir():
            if path.is_file() and path.name not in digests:
                digests[path.name] = digest(path)
        facts = {"content": "weights", "step": 0, "extra": dict(extra)}
        write_marker(folder, {**sizes, "cp": 1, "dp": 1}, digests, facts)
        building.publish()


def _without_zip_checksums() -> Any:
    """torch.save would compute a CRC-32 of its own (at a third of the speed); the marker has one of the whole file."""
    return serialization.patch({"save.compute_crc32": False})  # type: ignore[attr-defined]


class _Digested(FileIO):
    """A file being written from front to back, with its CRC-32 so far; what ``torch.save`` needs of a file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self.crc = self.size = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.crc, self.size = zlib.crc32(view, self.crc), self.size + len(view)
        while len(view):
            view = view[super().write(view) :]
        return memoryview(data).nbytes


def _write_rules(
    plan: StorePlan,
    rules: Sequence[Rule],
    load: Load,
    gate: MemoryGate,
    path: Path,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """One file of parameters; returns its digest and an entry per record."""
    entries: list[Entry] = []
    dtype = DTYPES[plan.dtype]
    with _Digested(path) as file:
        for rule in rules:
            place = plan.stored(rule)
            with gate.hold(2 * plan.nbytes(rule)):  # what it is made of, and what it is made into
                tensors = [load(t.name) for t in rule.hf]
                pieces = pieces_of(
                    rule, tensors, plan.weights.shape, plan.sizes.tp, plan.padded_vocab
                )
                del tensors
                for box, values in pieces:
                    offset, size = place.at(box)
                    start = file.size
                    torch.save(_alone(values.to(dtype)).reshape(size), file)
                    entries.append([place.key, offset, size, start, file.size - start])
                del values
            advance(plan.nbytes(rule))
        return {"digest": [file.size, file.crc], "entries": entries}


def _alone(values: Tensor) -> Tensor:
    """Make ``values`` the only tensor of its storage: ``torch.save`` writes storages whole. No copy if contiguous."""
    return torch.frombuffer(bytes_of(values), dtype=values.dtype)


def _write_objects(path: Path, plan: StorePlan) -> dict[str, Any]:
    """The (empty) extra state that megatron-core keeps of every linear layer, and its common state."""
    records = {COMMON: {"content_metadata": {"format": FORMAT}}}
    for rule in plan.rules:
        if rule.layer is not None and rule.cut is not Cut.REPLICATED:
            place = plan.stored(rule)
            module = place.key.rpartition(".")[0]
            at, of = (".".join(map(str, axis)) for axis in (place.lead, place.lead_size))
            records[f"{module}._extra_state/shard_{at}_{of}"] = None  # type: ignore[assignment]
    entries: list[Entry] = []
    with _Digested(path) as file:
        for key, value in records.items():
            buffer = io.BytesIO()
            torch.save([value], buffer)
            start = file.size
            write_all(file, buffer.getbuffer())
            entries.append([key, None, None, start, file.size - start])
        return {"digest": [file.size, file.crc], "entries": entries}


def _metadata(plan: StorePlan, written: Mapping[str, Mapping[str, Any]]) -> Metadata:
    """torch's index of the records."""
    sizes = {place.key: place.size for place in map(plan.stored, plan.rules)}
    properties = TensorProperties(dtype=DTYPES[plan.dtype])
    tensors: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for file, record in written.items():
        for key, offset, size, start, length in record["entries"]:
            if offset is None:
                tensors[key] = BytesStorageMetadata()
                index = MetadataIndex(key)
            else:
                known = tensors.setdefault(
                    key, TensorStorageMetadata(properties, torch.Size(sizes[key]), [])
                )
                known.chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(size)))
                index = MetadataIndex(key, torch.Size(offset))
            storage[index] = _StorageInfo(file, start, length)
    return Metadata(state_dict_metadata=tensors, storage_data=storage, storage_meta=StorageMeta())
