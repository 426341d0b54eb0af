"""Reading Hugging Face checkpoint folders: safetensors only, everything checked. Never unpickles anything."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from agpo_megatron.conversion.errors import ConversionError
from agpo_megatron.conversion.shape import TensorSpec
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
"""Files that travel with the weights when a checkpoint is written from another."""

STORED_DTYPES = {
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
    """Read ``config.json`` of a checkpoint folder. Raises ConversionError when it is missing or not a JSON object."""
    path = Path(folder)
    if not path.is_dir():
        raise ConversionError(f"checkpoint folder {path} does not exist or is not a folder")
    return _read_object(path / "config.json")


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
        """Read one tensor, in its stored dtype. Raises ConversionError for an unknown name or a damaged file."""
        path = self.file_of(name)
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{path}: cannot read {name} ({error})") from error
        return tensor

    def file_of(self, name: str) -> Path:
        """Find the file that holds a tensor. Raises ConversionError for an unknown name."""
        try:
            return self._file_of[name]
        except KeyError:
            raise ConversionError(f"{self.folder} holds no tensor {name!r}") from None

    def weight_map(self) -> WeightMap:
        """Return the model's table, after checking that the folder holds exactly its tensors.

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
        """Map each file name to the tensors that the index promises in it (None: no index)."""
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
                dtype = STORED_DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise ConversionError(f"{path}: {name} has unknown dtype {part.get_dtype()}")
                specs[name] = TensorSpec(name, tuple(part.get_shape()), dtype)
    except (SafetensorError, OSError) as error:
        raise ConversionError(
            f"{path} is truncated or not a safetensors file ({error}); fetch it again"
        ) from error
    return specs
