#!/usr/bin/env python3
"""Convert checkpoints: GGUF -> Hugging Face, Hugging Face <-> Megatron (dist_checkpointing), and compare them.

    convert_hf_checkpoint.py from-gguf FILE OUT
    convert_hf_checkpoint.py to-megatron HF_DIR OUT [--dtype bf16|fp32]
    convert_hf_checkpoint.py to-hf MEGATRON_DIR OUT [--like HF_DIR] [--dtype bf16|fp32] [--max-shard-size 5GB]
    convert_hf_checkpoint.py verify A B [--like HF_DIR] [--tolerance X]

A Megatron checkpoint is whole and loads in any layout. One made by to-megatron holds weights alone and remembers config
and tokenizer; one saved by a training run needs --like: the Hugging Face folder the run began from.
Exit code: 0 done or equal, 1 different, 2 refused (the message says why).
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agpo_megatron.conversion.comparison import differences
from agpo_megatron.conversion.errors import ConversionError
from agpo_megatron.conversion.gguf_import import convert_gguf
from agpo_megatron.conversion.hf_checkpoint import (
    HfCheckpoint,
    copy_side_files,
    read_config,
    write_hf_checkpoint,
)
from agpo_megatron.conversion.shape import TensorSpec, dtype_name
from agpo_megatron.conversion.weight_map import WeightMap

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ORIGIN = "huggingface"  # beside the Megatron files: config, tokenizer, generation config
Loader = Callable[[str], Tensor]


def to_megatron(hf_dir: Path, out: Path, dtype: str | None) -> None:
    """Weights of ``hf_dir`` as a Megatron checkpoint; it appears complete or not at all."""
    if out.exists():
        raise ConversionError(f"{out} exists already; remove it or choose another folder")
    _on_the_cpu()
    from agpo_megatron.policy import checkpoint, weights

    source = HfCheckpoint(hf_dir)
    weight_map = source.weight_map()
    dtype = dtype or _single_dtype(source)
    chunks, layout = _whole_model(weight_map, dtype)
    weights.load_hf(chunks, weight_map, source, layout)
    building = out.absolute().with_name(f".{out.name}.building")
    try:
        checkpoint.save_weights(building, chunks, layout, {"dtype": dtype})
        origin = building / ORIGIN
        origin.mkdir()
        copy_side_files(hf_dir, origin)
        shutil.copyfile(hf_dir / "config.json", origin / "config.json")
        building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def to_hf(
    megatron_dir: Path, out: Path, like: Path | None, dtype: str | None, max_shard_bytes: int
) -> None:
    """Weights of a Megatron checkpoint as a Hugging Face folder, in ``dtype`` (as made by to-megatron; else bf16)."""
    origin = like or megatron_dir / ORIGIN
    tensors, extra = _megatron_tensors(megatron_dir, like)
    target = DTYPES[dtype or extra.get("dtype", "bf16")]
    cast = ((name, tensor.to(target)) for name, tensor in tensors)
    write_hf_checkpoint(out, read_config(origin), cast, max_shard_bytes, origin)


def verify(a: Path, b: Path, like: Path | None, tolerance: float) -> int:
    """Print what differs; returns the number of tensors that do."""
    count = 0
    for difference in differences(*_opened(a, like), *_opened(b, like), tolerance):
        error = difference.max_error
        print(
            f"{difference.name}: {difference.what}"
            + ("" if error is None else f", max {error:.3g}")
        )
        count += 1
    return count


def _opened(folder: Path, like: Path | None) -> tuple[Mapping[str, TensorSpec], Loader]:
    """(tensor descriptions, loader) of a checkpoint of either kind."""
    if not (folder / "complete.json").is_file():
        source = HfCheckpoint(folder)
        copies = {copy for copy, _ in source.weight_map().tied_copies()}
        return {n: spec for n, spec in source.specs.items() if n not in copies}, source.load
    tensors, extra = _megatron_tensors(folder, None if (folder / ORIGIN).is_dir() else like)
    dtype = DTYPES[extra.get("dtype", "fp32")]
    held = {name: tensor.to(dtype) for name, tensor in tensors}
    specs = {n: TensorSpec(n, tuple(t.shape), dtype_name(t.dtype)) for n, t in held.items()}
    return specs, held.__getitem__


def _megatron_tensors(
    folder: Path, like: Path | None
) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any]]:
    """(Hugging Face tensors in fp32, what the checkpoint says of itself) of a Megatron checkpoint."""
    _on_the_cpu()
    from agpo_megatron.policy import checkpoint, weights

    origin = like or folder / ORIGIN
    if like is None and not origin.is_dir():
        raise ConversionError(
            f"{folder} does not say which model it is; give --like HF_DIR, the folder its run began from"
        )
    weight_map = WeightMap(read_config(origin))
    # fp32 holds every stored precision exactly.
    chunks, layout = _whole_model(weight_map, "fp32")
    extra = checkpoint.load_weights(folder, chunks, layout)
    return weights.named_hf_tensors(chunks, weight_map, layout), extra


def _on_the_cpu() -> None:
    """Must run before anything imports megatron, which the modules of ``policy`` do."""
    from agpo_megatron.policy import backend

    # The engines' own deprecations are nothing that the user of this tool can act on.
    warnings.simplefilter("ignore")
    backend.activate("cpu")


def _whole_model(weight_map: WeightMap, dtype: str) -> tuple[Sequence[Any], Any]:
    """(chunks, layout): the model in this one process, on the CPU, without optimizer."""
    from agpo_megatron.config.schema import PolicyConfig
    from agpo_megatron.policy import backend
    from agpo_megatron.policy.model import build_chunks, transformer_config

    settings = PolicyConfig.model_validate({"dtype": dtype})
    layout = _one_rank()
    with backend.current().scope():
        megatron = transformer_config(weight_map.shape, settings)
        return build_chunks(weight_map.shape, megatron, layout), layout


@cache
def _one_rank() -> Any:
    """The layout of this process alone; process groups can be made only once."""
    from agpo_megatron.config.schema import PolicyConfig
    from agpo_megatron.policy import parallel

    return parallel.initialize(PolicyConfig(), seed=0)


def _single_dtype(source: HfCheckpoint) -> str:
    stored = {spec.dtype for spec in source.specs.values()}
    for name, dtype in DTYPES.items():
        if stored == {dtype_name(dtype)}:
            return name
    raise ConversionError(
        f"{source.folder} holds {', '.join(sorted(stored))}; say --dtype bf16 or fp32"
    )


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 200MB")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help_text: str, *paths: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help_text)
        for path in paths:
            made.add_argument(path, type=Path)
        return made

    def add_like(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--like", type=Path, help="folder with config and tokenizer")

    command("from-gguf", "llama.cpp file to a Hugging Face folder", "file", "out")
    made = command("to-megatron", "Hugging Face folder to a Megatron checkpoint", "hf_dir", "out")
    made.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    made = command("to-hf", "Megatron checkpoint to a Hugging Face folder", "megatron_dir", "out")
    add_like(made)
    made.add_argument("--dtype", choices=DTYPES, help="default: as converted, bf16 for a run's")
    made.add_argument("--max-shard-size", type=_bytes, default=5 * 10**9, metavar="SIZE")
    made = command("verify", "compare two checkpoints tensor by tensor", "a", "b")
    add_like(made)
    made.add_argument("--tolerance", type=float, default=0.0, help="0 (default): equal bits")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one command; returns the exit code."""
    given = _arguments(argv)
    try:
        if given.command == "verify":
            count = verify(given.a, given.b, given.like, given.tolerance)
            print("equal" if count == 0 else f"{count} tensors differ")
            return 1 if count else 0
        if given.command == "from-gguf":
            convert_gguf(given.file, given.out)
        elif given.command == "to-megatron":
            to_megatron(given.hf_dir, given.out, given.dtype)
        else:
            to_hf(given.megatron_dir, given.out, given.like, given.dtype, given.max_shard_size)
        print(f"wrote {given.out}")
        return 0
    except (ConversionError, RuntimeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
