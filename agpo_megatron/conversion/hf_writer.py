"""Writing Hugging Face checkpoint folders: safetensors files streamed tensor by tensor, index, config, tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from agpo_megatron.conversion.building import (
    FileJob,
    MemoryGate,
    Pace,
    open_building,
    publish_folder,
    refuse_existing,
)
from agpo_megatron.conversion.errors import ConversionError
from agpo_megatron.conversion.hf_checkpoint import (
    INDEX,
    SIDE_FILES,
    SINGLE,
    STORED_DTYPES,
    read_config,
)
from agpo_megatron.conversion.manifest import buckets
from agpo_megatron.conversion.shape import TensorSpec, dtype_name, with_both_spellings
from agpo_megatron.files import digest, write_all

_NAME_OF_DTYPE = {name: stored for stored, name in STORED_DTYPES.items()}
GATE_FLOOR = 128 << 20
"""Bytes that threads may hold together however small the tensors are."""


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that are made together (q, k and v of one Megatron parameter): ``load`` gives all of ``specs``, each as
    blocks of its rows, in order."""

    specs: tuple[TensorSpec, ...]
    load: Callable[[], Mapping[str, Sequence[Tensor]]]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)


@dataclass(frozen=True)
class HfTarget:
    """A checkpoint folder to be written. ``side_files``: folder that tokenizer, chat template and generation config are
    copied from; ``max_shard_bytes``: limit of one safetensors file (a single group may be larger); ``quantization``:
    becomes ``quantization_config``."""

    folder: Path
    config: Mapping[str, Any]
    side_files: Path | None = None
    max_shard_bytes: int = 5 * 10**9
    quantization: Mapping[str, Any] | None = None


def write_hf_groups(
    target: HfTarget, groups: Sequence[TensorGroup], identity: Mapping[str, Any], pace: Pace
) -> None:
    """Write a checkpoint folder that transformers and SGLang load; it appears complete or not at all.

    Memory: the groups that ``pace.workers`` threads make, of any file, together at most twice the largest tensor (or
    ``GATE_FLOOR``) unless one alone is larger. ``identity``: what is converted and how; an interrupted attempt of the
    same is resumed.
    Raises ConversionError when the folder exists, the disk is full, or a group gives something else than it promised.
    """
    if not groups:
        raise ConversionError("no tensors to write")
    shards = _shards(groups, target.max_shard_bytes)
    largest = max(spec.nbytes for group in groups for spec in group.specs)
    gate = MemoryGate(max(2 * largest, GATE_FLOOR))
    layout = {name: [s.name for g in held for s in g.specs] for name, held in shards.items()}
    identity = {**identity, "files": digest_of(layout)}
    with (
        open_building(target.folder, identity) as building,
        ThreadPoolExecutor(max(1, pace.workers)) as pool,
    ):
        write = {name: partial(_write_groups, held, gate, pool) for name, held in shards.items()}
        sizes = {name: sum(group.nbytes for group in held) for name, held in shards.items()}
        building.write({name: FileJob(sizes[name], write[name]) for name in shards}, pace)
        specs = {name: [s for g in held for s in g.specs] for name, held in shards.items()}
        _write_side(building.folder, target.config, specs, target.side_files)
        if target.quantization is not None:
            config = read_config(building.folder)
            config["quantization_config"] = dict(target.quantization)
            write_json(building.folder / "config.json", config)
        building.publish()


def digest_of(content: Any) -> str:
    """Compute a short fingerprint of a JSON value."""
    return digest(json.dumps(content, sort_keys=True).encode())[:16]


def _shards(groups: Sequence[TensorGroup], max_bytes: int) -> dict[str, list[TensorGroup]]:
    """Deal groups to files, by name, in order; none is above ``max_bytes`` unless it holds one group alone."""
    shards = buckets(groups, max_bytes)
    names = shard_names(len(shards))
    return dict(zip(names, shards, strict=True))


def shard_names(count: int) -> list[str]:
    """Name ``count`` weight files as transformers does."""
    if count == 1:
        return [SINGLE]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _write_groups(
    groups: Sequence[TensorGroup],
    gate: MemoryGate,
    pool: ThreadPoolExecutor,
    path: Path,
    advance: Callable[[int], None],
) -> None:
    with _SafetensorsFile(path, [spec for group in groups for spec in group.specs]) as file:

        def write(group: TensorGroup) -> None:
            with gate.hold(2 * group.nbytes):  # what it is made of, and what it is made into
                tensors = dict(group.load())
                for spec in group.specs:
                    file.put(spec.name, tensors.pop(spec.name))
            advance(group.nbytes)

        running = [pool.submit(write, group) for group in groups]
        try:
            for one in running:
                one.result()
        finally:
            wait([one for one in running if not one.cancel()])  # they still write to the file


class _SafetensorsFile:
    """A safetensors file of known tensors, which any threads ``put`` in any order. Raises ConversionError for another
    tensor than promised, and at the end for one that never came."""

    def __init__(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        self._name = path.name
        self._left = {spec.name: spec for spec in specs}
        header, self._offsets = _header(specs)
        self._start = 8 + len(header)
        self._file = FileIO(path, "w")
        write_all(self._file, len(header).to_bytes(8, "little") + header)

    def __enter__(self) -> Self:
        return self

    def put(self, name: str, blocks: Sequence[Tensor]) -> None:
        spec = self._left.pop(name, None)
        found = {TensorSpec(name, tuple(_shape(blocks)), dtype_name(b.dtype)) for b in blocks}
        if found != {spec}:
            raise ConversionError(f"{self._name}: expected {spec}, was given {found}")
        at = self._start + self._offsets[name]
        for block in blocks:
            data = bytes_of(block)
            while len(data):  # one call to the system takes 2 GB at most
                count = os.pwrite(self._file.fileno(), data, at)
                data, at = data[count:], at + count

    def __exit__(self, failure: type[BaseException] | None, *_: Any) -> None:
        self._file.close()
        if failure is None and self._left:
            raise ConversionError(f"{self._name}: {', '.join(list(self._left)[:3])} never came")


def _shape(blocks: Sequence[Tensor]) -> torch.Size:
    """Compute the shape of the tensor that blocks of rows make up. Raises ConversionError where rows differ."""
    if len(blocks) == 1:
        return blocks[0].shape
    if len({block.shape[1:] for block in blocks}) != 1:
        raise ConversionError(f"blocks of different rows: {[list(b.shape) for b in blocks]}")
    return torch.Size([sum(len(block) for block in blocks), *blocks[0].shape[1:]])


def _header(specs: Sequence[TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """Return (padded JSON header, offset of each tensor): wide elements first, so that every tensor is aligned."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for spec in sorted(specs, key=lambda s: -(s.nbytes // max(s.numel, 1))):
        if spec.name in offsets:
            raise ConversionError(f"tensor {spec.name} was given twice")
        offsets[spec.name] = end
        entries[spec.name] = {
            "dtype": _NAME_OF_DTYPE[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.nbytes],
        }
        end += spec.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8), offsets


def bytes_of(tensor: Tensor) -> memoryview:
    """View the tensor's bytes, without a copy if it is contiguous."""
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _write_side(
    folder: Path,
    config: Mapping[str, Any],
    files: Mapping[str, Sequence[TensorSpec]],
    side_files: Path | None,
) -> None:
    """Write the index (if there are several files), the config in both spellings, and the side files."""
    specs = [spec for held in files.values() for spec in held]
    if len(files) > 1:
        weight_map = {spec.name: name for name, held in files.items() for spec in held}
        total = sum(spec.nbytes for spec in specs)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    spelled = with_both_spellings(config)
    dtype = next((s.dtype for s in specs if s.dtype in ("bfloat16", "float32", "float16")), None)
    if dtype is not None:
        spelled |= {"dtype": dtype, "torch_dtype": dtype}
    write_json(folder / "config.json", spelled)
    if side_files is not None:
        copy_side_files(side_files, folder)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy tokenizer, chat template and generation config, those that are there."""
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def write_hf_checkpoint(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int = 5 * 10**9,
    source_dir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint folder of tensors that come once, in their own order (from a live policy, for instance).

    They are held in memory up to ``max_shard_bytes``. A failure leaves nothing behind. Raises ConversionError when
    the folder exists (and ``overwrite`` is false) or the disk refuses.
    """
    target = Path(folder).absolute()
    refuse_existing(target, overwrite)
    partial_folder = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir(parents=True)
        written: list[list[TensorSpec]] = []
        for shard in _held(tensors, max_shard_bytes):
            specs = [TensorSpec(n, tuple(t.shape), dtype_name(t.dtype)) for n, t in shard.items()]
            with _SafetensorsFile(partial_folder / f"shard-{len(written)}", specs) as file:
                for name, tensor in shard.items():
                    file.put(name, [tensor])
            written.append(specs)
        if not written:
            raise ConversionError("no tensors to write")
        files = dict(zip(shard_names(len(written)), written, strict=True))
        for i, name in enumerate(files):
            (partial_folder / f"shard-{i}").rename(partial_folder / name)
        _write_side(partial_folder, config, files, Path(source_dir) if source_dir else None)
        publish_folder(partial_folder, target, overwrite)
    except OSError as error:
        raise ConversionError(f"writing {target} failed: {error}") from error
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def _held(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    seen: set[str] = set()
    for name, tensor in tensors:
        if name in seen:
            raise ConversionError(f"tensor {name} was given twice")
        seen.add(name)
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        # A copy: what comes may be a view of a live parameter.
        shard[name] = tensor.detach().to("cpu", copy=True)
        size += tensor.nbytes
    if shard:
        yield shard
