"""Reading the weights of a Megatron checkpoint piece by piece, without Megatron and without trusting its pickles.

``.metadata`` is a pickle. It is taken apart by an unpickler that knows two dozen names and answers each with an inert
record of this module: nothing of the file's choosing is imported or called, anything else is refused. The tensors are
``torch.save`` records, whose descriptions ``torch.load`` reads as weights only (stored_record.py).
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agpo_megatron.conversion.cutting import padded_vocabulary
from agpo_megatron.conversion.shape import DTYPES, TensorSpec, dtype_name
from agpo_megatron.conversion.tables import Cut, Rule
from agpo_megatron.conversion.weight_map import WeightMap
from agpo_megatron.policy.marker import CheckpointError, check_file, read_marker
from agpo_megatron.policy.stored import MODEL_KEYS, Box, boxes, hf_boxes, hf_of, stored
from agpo_megatron.policy.stored_record import read_record

METADATA = ".metadata"


@dataclass(frozen=True)
class Chunk:
    """A stored piece of a tensor: its box, and the record that holds it."""

    box: Box
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor as stored. ``chunks`` cover it."""

    key: str
    size: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    def chunks_near(self, box: Box) -> Sequence[Chunk]:
        """Select the chunks that may share values with ``box``: those with the same indices on the leading axes (layer,
        expert), where each is of size 1; there may be tens of thousands in all."""
        axes, by_lead = self._by_lead
        offset, size = box
        if any(n != 1 for n in size[:axes]):
            return self.chunks
        return by_lead.get(offset[:axes], ())

    @cached_property
    def _by_lead(self) -> tuple[int, dict[tuple[int, ...], list[Chunk]]]:
        axes = 0
        while axes < len(self.size) and all(chunk.box[1][axes] == 1 for chunk in self.chunks):
            axes += 1
        found: dict[tuple[int, ...], list[Chunk]] = {}
        for chunk in self.chunks:
            found.setdefault(chunk.box[0][:axes], []).append(chunk)
        return axes, found


class StoredCheckpoint:
    """A checkpoint folder: ``marker``, ``tensors`` (weights by key, unread), ``read``.

    Raises CheckpointError for a folder that is no complete checkpoint, and for a ``.metadata`` that is damaged or holds
    anything but descriptions of tensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.marker = read_marker(folder)
        for name in self.marker["files"]:
            if name != Path(name).name or name in ("", ".", ".."):
                raise CheckpointError(f"{folder}: the marker names {name!r}, outside the folder")
        if METADATA not in self.marker["files"]:
            raise CheckpointError(f"checkpoint {folder} is damaged: {METADATA} is missing")
        check_file(folder, METADATA, self.marker["files"][METADATA])
        self.tensors = _tensors(folder, self.marker["files"])

    def check_files(self, workers: int, share: slice = slice(None)) -> None:
        """Compare every file, or a ``share`` of them, with the marker. Raises CheckpointError naming one that is not
        what was written."""
        with ThreadPoolExecutor(workers) as pool:
            files = sorted(self.marker["files"].items())[share]
            for done in [pool.submit(check_file, self.folder, name, d) for name, d in files]:
                done.result()

    def read(self, key: str, box: Box) -> Tensor:
        """A part of the tensor ``key``, from whatever pieces it is stored in. Raises CheckpointError."""
        chunks = self._chunks(key, box)
        dtype = self.tensors[key].dtype
        offset, size = box
        out: Tensor | None = None
        covered = 0
        for chunk in chunks:
            common = _intersection(box, chunk.box)
            if common is None:
                continue
            values = self._load(key, dtype, chunk)
            if common == box == chunk.box:
                return values
            if out is None:
                out = torch.empty(size, dtype=dtype)
            part = values[_slices(common, chunk.box[0])]
            out[_slices(common, offset)] = part
            covered += part.numel()
        if out is None or covered != out.numel():
            raise CheckpointError(
                f"checkpoint {self.folder} holds {covered} of the {torch.Size(size).numel()} values of {key} "
                f"at {offset}"
            )
        return out

    def read_rows(self, key: str, box: Box, axis: int) -> list[Tensor]:
        """Read like ``read``, but in blocks along ``axis``, in order, where it is stored so: those are not copied."""
        at = box[0][axis]
        blocks = []
        for chunk in sorted(self._chunks(key, box), key=lambda chunk: chunk.box[0][axis]):
            common = _intersection(box, chunk.box)
            if common is None:
                continue
            size = common[1]
            next_rows = (
                (*box[0][:axis], at, *box[0][axis + 1 :]),
                (*box[1][:axis], size[axis], *box[1][axis + 1 :]),
            )
            if common != next_rows:
                break
            values = self._load(key, self.tensors[key].dtype, chunk)
            blocks.append(values[_slices(common, chunk.box[0])])
            at += size[axis]
        return blocks if at == box[0][axis] + box[1][axis] else [self.read(key, box)]

    def _chunks(self, key: str, box: Box) -> Sequence[Chunk]:
        if key not in self.tensors:
            raise CheckpointError(f"checkpoint {self.folder} lacks {key}")
        return self.tensors[key].chunks_near(box)

    def _load(self, key: str, dtype: torch.dtype, chunk: Chunk) -> Tensor:
        path = self.folder / chunk.file
        try:
            tensor = read_record(path, chunk.start, chunk.length)
        except Exception as error:  # whatever a damaged or hostile record leads to
            raise CheckpointError(f"{path}: cannot read {key} ({error})") from error
        if tuple(tensor.shape) != chunk.box[1] or tensor.dtype != dtype:
            raise CheckpointError(f"{path}: the record of {key} is not what {METADATA} says")
        return tensor


class StoredModel:
    """The weights of a checkpoint as Hugging Face tensors. ``weights``: the model that it must be of.

    Raises CheckpointError when the stored tensors are not exactly those of that model.
    """

    def __init__(self, source: StoredCheckpoint, weights: WeightMap) -> None:
        self.source, self.weights = source, weights
        self._stored_rules = {rule.hf[0].name: rule for rule in weights.rules()}
        expected: dict[str, tuple[int, ...]] = {}
        for rule in weights.rules():
            place = stored(rule, weights.shape, weights.shape.vocab_size)
            expected[place.key] = place.size
        unread = sorted(source.tensors.keys() - expected.keys())
        if unread:
            raise CheckpointError(
                f"checkpoint {source.folder} holds {', '.join(unread[:3])}, which the model at hand has no place for: "
                "it was saved from another model"
            )
        for key, size in expected.items():
            tensor = source.tensors.get(key)
            found = tensor.size if tensor else None
            # Vocabulary padding: more rows than the vocabulary has.
            padded = found and not key.startswith("decoder.") and found[0] >= size[0]
            if found is None or found[1:] != size[1:] or (found != size and not padded):
                raise CheckpointError(
                    f"checkpoint {source.folder} holds {key} with shape {list(found or [])}, the model at hand needs "
                    f"{list(size)}: it was saved from another model"
                )

    def load(self, rule: Rule) -> dict[str, Tensor]:
        """The Hugging Face tensors of one parameter, in the stored dtype."""
        place = stored(rule, self.weights.shape, self.weights.shape.vocab_size)
        parts = []
        for box in hf_boxes(rule, self.weights.shape):
            parts.append(self.source.read(place.key, place.at(box)).view(box[1]))
        return hf_of(rule, parts, self.weights.shape)

    def load_shard(self, rule: Rule, tp: int, rank: int) -> Tensor:
        """The part of a parameter that tensor-parallel rank ``rank`` of ``tp`` holds, in the stored dtype, whatever
        layout the checkpoint is cut for; rows beyond the vocabulary are 0."""
        shape = self.weights.shape
        rule = self._stored_rules[rule.hf[0].name]  # the embedding's for a tied head
        place = stored(rule, shape, padded_vocabulary(shape.vocab_size, tp))
        every = list(boxes(rule, place.body, tp))
        parts = []
        for offset, size in every if rule.cut is Cut.REPLICATED else every[rank::tp]:
            rows = size[0]
            if rule.cut is Cut.VOCABULARY:
                rows = max(0, min(rows, shape.vocab_size - offset[0]))
            if rows:
                box = (offset, (rows, *size[1:]))
                parts.append(self.source.read(place.key, place.at(box)).view(box[1]))
            if rows < size[0]:
                dtype = self.source.tensors[place.key].dtype
                parts.append(torch.zeros(size[0] - rows, *size[1:], dtype=dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def load_rows(self, rule: Rule) -> dict[str, list[Tensor]]:
        """Load like ``load``, each tensor as blocks of its rows, in order: mapped from files that hold them so."""
        if rule.cut is Cut.GROUPED_QKV:
            return {name: [tensor] for name, tensor in self.load(rule).items()}
        place = stored(rule, self.weights.shape, self.weights.shape.vocab_size)
        found = {}
        for tensor, box in zip(rule.hf, hf_boxes(rule, self.weights.shape), strict=True):
            blocks = self.source.read_rows(place.key, place.at(box), axis=len(place.lead))
            found[tensor.name] = [block.reshape(-1, *box[1][1:]) for block in blocks]
        return found

    def specs(self, dtype: str | None = None) -> Iterator[tuple[Rule, list[TensorSpec]]]:
        """Each rule with the Hugging Face tensors it gives, in ``dtype`` or as stored."""
        for rule in self.weights.rules():
            key = stored(rule, self.weights.shape, self.weights.shape.vocab_size).key
            name = dtype or dtype_name(self.source.tensors[key].dtype)
            sizes = self.weights.shape.sizes
            yield rule, [TensorSpec(t.name, sizes(t.dims), name) for t in rule.hf]


# ---------------------------------------------------------------- .metadata


class _Inert:
    """Stands for an object of a class that ``.metadata`` names: keeps what it was made of, does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getitem__(self, name: str) -> Any:
        return self.state[name]


class _KnownOnly(pickle.Unpickler):
    """Answers the names of ``_KNOWN`` and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}") from None


_CHECKPOINT = "torch.distributed.checkpoint."
_KNOWN: dict[tuple[str, str], Any] = {
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
    ("collections", "OrderedDict"): dict,
    **{("torch", dtype_name(dtype)): dtype for dtype in DTYPES.values()},
    **{
        (_CHECKPOINT + module, name): type(name, (_Inert,), {})
        for module, names in {
            "metadata": (
                "Metadata TensorStorageMetadata BytesStorageMetadata TensorProperties ChunkStorageMetadata "
                "MetadataIndex StorageMeta _MEM_FORMAT_ENCODING"
            ),
            "filesystem": "_StorageInfo _StoragePrefix",
            "planner": "SavePlan WriteItem WriteItemType TensorWriteData",
        }.items()
        for name in names.split()
    },
}


def _tensors(folder: Path, files: dict[str, list[int]]) -> dict[str, StoredTensor]:
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _KnownOnly(file).load()
        records = {
            (index["fqn"], tuple(index.state["offset"])): info
            for index, info in metadata["storage_data"].items()
            if index.state.get("offset") is not None
        }
        found = {}
        for key, described in metadata["state_dict_metadata"].items():
            if type(described).__name__ != "TensorStorageMetadata" or not key.startswith(
                MODEL_KEYS
            ):
                continue
            chunks = tuple(_chunk(key, chunk, records, files) for chunk in described["chunks"])
            dtype = described["properties"].state[0]
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{key} has dtype {dtype!r}")
            found[key] = StoredTensor(key, tuple(described["size"]), dtype, chunks)
        return found
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    except Exception as error:  # whatever a damaged or hostile pickle leads to
        raise CheckpointError(
            f"{path} is damaged, or not the description of a checkpoint ({error}); it was not loaded"
        ) from error


def _chunk(
    key: str,
    chunk: _Inert,
    records: dict[tuple[str, tuple[int, ...]], _Inert],
    files: dict[str, list[int]],
) -> Chunk:
    offset, size = tuple(chunk["offsets"]), tuple(chunk["sizes"])
    info = records[key, offset]
    file, start, length = info["relative_path"], info["offset"], info["length"]
    if file not in files or not 0 <= start <= start + length <= files[file][0]:
        raise ValueError(f"{key} points to bytes {start}+{length} of {file!r}")
    if info.state.get("transform_descriptors"):
        raise ValueError(f"{key} is stored compressed")
    return Chunk((offset, size), file, start, length)


# ---------------------------------------------------------------- boxes


def _intersection(a: Box, b: Box) -> Box | None:
    offset = tuple(max(x, y) for x, y in zip(a[0], b[0], strict=True))
    ends = [min(x + n, y + m) for x, n, y, m in zip(a[0], a[1], b[0], b[1], strict=True)]
    size = tuple(end - start for start, end in zip(offset, ends, strict=True))
    return None if any(n <= 0 for n in size) else (offset, size)


def _slices(box: Box, origin: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(
        slice(start - zero, start - zero + n) for start, n, zero in zip(*box, origin, strict=True)
    )
