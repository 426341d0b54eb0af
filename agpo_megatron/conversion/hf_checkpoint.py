"""Hugging Face checkpoint folders: checked reading of safetensors, atomic writing. Never unpickles anything."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from agpo_megatron.conversion.errors import ConversionError
from agpo_megatron.conversion.shape import TensorSpec, dtype_name, with_both_spellings
from agpo_megatron.conversion.weight_map import WeightMap

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""What travels with the weights when a checkpoint is written from another."""

_STORED_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """``config.json`` of a checkpoint folder. Raises ConversionError when it is missing or not a JSON object."""
    path = Path(folder)
    if not path.is_dir():
        raise ConversionError(f"checkpoint folder {path} does not exist or is not a folder")
    return _read_object(path / "config.json")


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy tokenizer, chat template and generation config, those that are there."""
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


class HfCheckpoint:
    """A checkpoint folder: ``config``, ``specs`` (every tensor, unread) and ``load(name)``.

    Opening reads and checks the header of every safetensors file, no tensor data. Raises ConversionError for a missing
    folder, config or shard, a truncated file, an index that disagrees with its files or leads out of the folder, and
    for pickled weights.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        self.specs: dict[str, TensorSpec] = {}
        self._file_of: dict[str, Path] = {}
        for file_name, promised in self._files().items():
            path = self.folder / file_name
            if not path.is_file():
                raise ConversionError(f"{self.folder}: weight file {file_name} is missing")
            specs = _read_header(path)
            if promised is not None and promised != set(specs):
                odd = ", ".join(sorted(promised ^ set(specs))[:3])
                raise ConversionError(f"{path} and {INDEX} disagree about {odd}")
            self.specs.update(specs)
            self._file_of.update(dict.fromkeys(specs, path))

    def load(self, name: str) -> Tensor:
        """One tensor on the CPU, in its stored dtype. Raises ConversionError for an unknown name or a damaged file."""
        path = self._file_of.get(name)
        if path is None:
            raise ConversionError(f"{self.folder} holds no tensor {name!r}")
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{path}: cannot read {name} ({error})") from error
        return tensor

    def weight_map(self) -> WeightMap:
        """The model's table, after checking that the folder holds exactly its tensors.

        Raises ConversionError as ``WeightMap.check_hf``, and when tied embeddings are stored twice and differ.
        """
        weights = WeightMap(self.config)
        weights.check_hf({name: spec.shape for name, spec in self.specs.items()})
        for name, original in weights.tied_copies():
            if name in self.specs and not torch.equal(self.load(name), self.load(original)):
                raise ConversionError(
                    f"{self.folder}: config.json ties {name} to {original} but they differ; "
                    "set tie_word_embeddings to false"
                )
        return weights

    def _files(self) -> dict[str, set[str] | None]:
        """File name -> the tensors the index promises in it (None: no index)."""
        if (self.folder / INDEX).is_file():
            return dict(_read_index(self.folder / INDEX))
        if (self.folder / SINGLE).is_file():
            return {SINGLE: None}
        pickles = sorted(p.name for s in ("*.bin", "*.pt", "*.pth") for p in self.folder.glob(s))
        if pickles:
            raise ConversionError(
                f"{self.folder} holds pickled weights ({pickles[0]}), which are never loaded; "
                "save them as safetensors first"
            )
        raise ConversionError(f"{self.folder} holds neither {SINGLE} nor {INDEX}")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} is not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must hold a JSON object")
    return content


def _read_index(path: Path) -> dict[str, set[str]]:
    weight_map = _read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{path} has no weight_map")
    files: dict[str, set[str]] = {}
    for tensor, file_name in weight_map.items():
        # A plain name cannot lead out of the folder. (Resolving it would refuse hub caches, which link every file.)
        plain = isinstance(file_name, str) and file_name == os.path.basename(file_name)
        if not plain or file_name in ("", ".", "..") or "\\" in file_name:
            raise ConversionError(f"{path}: {tensor} points outside the folder ({file_name!r})")
        if not file_name.endswith(".safetensors"):
            raise ConversionError(
                f"{path}: {tensor} is in {file_name!r}, which is not a safetensors file and is never loaded"
            )
        files.setdefault(file_name, set()).add(tensor)
    return files


def _read_header(path: Path) -> dict[str, TensorSpec]:
    specs = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                part = file.get_slice(name)
                dtype = _STORED_DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise ConversionError(f"{path}: {name} has unknown dtype {part.get_dtype()}")
                specs[name] = TensorSpec(name, tuple(part.get_shape()), dtype)
    except (SafetensorError, OSError) as error:
        raise ConversionError(
            f"{path} is truncated or not a safetensors file ({error}); fetch it again"
        ) from error
    return specs


def write_hf_checkpoint(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int = 5 * 10**9,
    source_dir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint folder that transformers and SGLang load; it appears complete or not at all.

    ``tensors``: (name, tensor) in any order, consumed once; held in memory up to ``max_shard_bytes``. ``config`` gets
    both spellings of RoPE and of the dtype. ``source_dir``: where tokenizer, chat template and generation config are
    copied from. The folder is written beside its place under a temporary name, synced, renamed.
    Raises ConversionError when the folder exists (and ``overwrite`` is false) or the disk refuses.
    """
    target = Path(folder).absolute()
    if target.exists() and not overwrite:
        raise ConversionError(f"{target} exists already; remove it or choose another folder")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        dtype = _write_shards(partial, tensors, max_shard_bytes)
        spelled = {**with_both_spellings(config), "dtype": dtype, "torch_dtype": dtype}
        _write_json(partial / "config.json", spelled)
        if source_dir is not None:
            copy_side_files(Path(source_dir), partial)
        _readable_as(partial / "config.json", partial)
        _sync_folder(partial)
        _swap_in(partial, target)
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"writing {target} failed: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> str:
    """Write the safetensors files and, if there are several, the index. Returns the name of the first float dtype."""
    dtype, total = "", 0
    placed: list[list[str]] = []
    for shard in _shards(tensors, max_bytes):
        save_file(shard, folder / f"shard-{len(placed)}", metadata={"format": "pt"})
        placed.append(list(shard))
        total += sum(t.numel() * t.element_size() for t in shard.values())
        floats = [t.dtype for t in shard.values() if t.is_floating_point()]
        dtype = dtype or (dtype_name(floats[0]) if floats else "")
    if not placed:
        raise ConversionError("no tensors to write")
    if len(placed) == 1:
        (folder / "shard-0").rename(folder / SINGLE)
        return dtype
    names = [f"model-{i + 1:05d}-of-{len(placed):05d}.safetensors" for i in range(len(placed))]
    for i, name in enumerate(names):
        (folder / f"shard-{i}").rename(folder / name)
    weight_map = {t: name for name, held in zip(names, placed, strict=True) for t in held}
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return dtype


def _shards(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    seen: set[str] = set()
    for name, tensor in tensors:
        if name in seen:
            raise ConversionError(f"tensor {name} was given twice")
        seen.add(name)
        nbytes = tensor.numel() * tensor.element_size()
        if shard and size + nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        # A clone of its own storage: views of one parameter (gate and up) must not count as shared memory.
        shard[name] = tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        size += nbytes
    if shard:
        yield shard


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _readable_as(model: Path, folder: Path) -> None:
    """Give every file the permissions of ``model``: safetensors writes files that only their owner may read."""
    for path in folder.iterdir():
        path.chmod(model.stat().st_mode)


def _sync_folder(folder: Path) -> None:
    for path in [*sorted(folder.iterdir()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap_in(partial: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    partial.rename(target)
    parent = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
    shutil.rmtree(old, ignore_errors=True)
