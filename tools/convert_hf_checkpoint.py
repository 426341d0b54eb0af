#!/usr/bin/env python3
"""Convert checkpoints: GGUF -> Hugging Face, Hugging Face <-> Megatron (dist_checkpointing); compare, look inside.

    convert_hf_checkpoint.py from-gguf FILE OUT
    convert_hf_checkpoint.py to-megatron HF_DIR OUT [--tp N --pp N --vpp N --ep N] [--dtype bf16|fp32] [--plan]
    convert_hf_checkpoint.py to-hf MEGATRON_DIR OUT [--like HF_DIR] [--dtype bf16|fp32|fp8-block] [--max-shard-size 5GB]
    convert_hf_checkpoint.py verify A B [--like HF_DIR] [--tolerance X]
    convert_hf_checkpoint.py inspect DIR

A Megatron checkpoint loads in any layout; the one given is the one it is cut for. One made by to-megatron holds
weights, config and tokenizer, and can be the model.path of a run; one saved by a training run needs --like: the folder
the run began from. Tensors are streamed: memory is that of the largest few (from-gguf: of all). The same command takes
up an interrupted conversion.
Exit code: 0 done or equal, 1 different, 2 refused (the message says why).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from torch import Tensor

from agpo_megatron.conversion.building import Pace, refuse_existing
from agpo_megatron.conversion.comparison import differences
from agpo_megatron.conversion.errors import ConversionError
from agpo_megatron.conversion.fp8 import (
    quantised_names,
    quantised_specs,
    quantised_tensors,
    quantization_config,
)
from agpo_megatron.conversion.gguf_import import convert_gguf
from agpo_megatron.conversion.hf_checkpoint import HfCheckpoint, read_config
from agpo_megatron.conversion.hf_writer import (
    HfTarget,
    TensorGroup,
    copy_side_files,
    write_hf_groups,
)
from agpo_megatron.conversion.shape import DTYPES, TensorSpec
from agpo_megatron.conversion.tables import Rule
from agpo_megatron.conversion.weight_map import WeightMap
from agpo_megatron.files import digest
from agpo_megatron.policy.marker import MARKER
from agpo_megatron.policy.stored import ParallelSizes, StorePlan
from agpo_megatron.policy.stored_reader import StoredCheckpoint, StoredModel
from agpo_megatron.policy.stored_writer import write_weights

CONFIG = "config.json"
DTYPE_NAMES = {"bf16": "bfloat16", "fp32": "float32"}
FP8 = "fp8-block"
FILE_BYTES = 1 << 30  # of one file of a Megatron checkpoint
Loader = Callable[[str], Tensor]


def to_megatron(
    hf_dir: Path, out: Path, sizes: ParallelSizes, dtype: str | None, workers: int
) -> None:
    """Write the weights of ``hf_dir`` as a Megatron checkpoint; it appears complete or not at all."""
    refuse_existing(out)
    source = HfCheckpoint(hf_dir)
    stored = dtype or _single_dtype(source)
    plan = StorePlan.of(source.weight_map(), sizes, stored, FILE_BYTES)

    def put_beside(folder: Path) -> None:
        copy_side_files(hf_dir, folder)
        shutil.copyfile(hf_dir / CONFIG, folder / CONFIG)

    total = sum(plan.nbytes(rule) for rule in plan.rules)
    with _progress(f"writing {out}", total, workers) as pace:
        write_weights(out, plan, source.load, _identity(hf_dir), {}, put_beside, pace)


def plan_megatron(hf_dir: Path, sizes: ParallelSizes, dtype: str | None) -> None:
    """Print what ``to_megatron`` would write, from ``config.json`` alone."""
    config = read_config(hf_dir)
    weights = WeightMap(config)
    named = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    plan = StorePlan.of(weights, sizes, dtype or named, FILE_BYTES)
    for name, rules in plan.files.items():
        print(f"{name}  {decimal(sum(plan.nbytes(rule) for rule in rules))}")
        for rule in rules:
            place = plan.stored(rule)
            at = "".join(f"[{i}]" for i in place.lead)
            made_of = ", ".join(t.name for t in rule.hf)
            print(f"  {place.key}{at} {list(place.body)} <- {made_of}")
    shapes = weights.hf_shapes()
    parameters = sum(TensorSpec(n, s, plan.dtype).numel for n, s in shapes.items())
    total = sum(plan.nbytes(rule) for rule in plan.rules)
    print(
        f"{weights.architecture.name}: {parameters:,} parameters in {len(shapes)} tensors; {len(plan.files)} files, "
        f"{decimal(total)} in {plan.dtype}, vocabulary {weights.shape.vocab_size} padded to {plan.padded_vocab}; "
        f"TP {sizes.tp} x PP {sizes.pp} x VPP {sizes.vpp} x EP {sizes.ep}"
    )


def to_hf(
    megatron_dir: Path,
    out: Path,
    like: Path | None,
    dtype: str | None,
    max_shard: int,
    workers: int,
) -> None:
    """Write the weights of a Megatron checkpoint as a Hugging Face folder, in ``dtype`` (default: as stored)."""
    refuse_existing(out)
    model, origin = _stored_model(megatron_dir, like)
    model.source.check_files(workers)
    base = "bfloat16" if dtype == FP8 else dtype
    quantised = quantised_names(model.weights) if dtype == FP8 else frozenset[str]()
    groups = []
    for rule, specs in model.specs(base):
        load = partial(_load_as, model, rule, {s.name: s.dtype for s in specs}, quantised)
        groups.append(TensorGroup(tuple(quantised_specs(specs, quantised)), load))
    target = HfTarget(
        out,
        read_config(origin),
        origin,
        max_shard,
        quantization_config(model.weights) if dtype == FP8 else None,
    )
    identity = {"dtype": dtype, "origin": _identity(origin), **_identity(megatron_dir)}
    with _progress(f"writing {out}", sum(group.nbytes for group in groups), workers) as pace:
        write_hf_groups(target, groups, identity, pace)


def _load_as(
    model: StoredModel, rule: Rule, dtypes: Mapping[str, str], quantised: frozenset[str]
) -> dict[str, list[Tensor]]:
    if quantised:  # from the stored values, not from what they round to
        return {
            name: [
                tensor
                if name in quantised or "_scale_inv" in name
                else tensor.to(DTYPES[dtypes[name]])
            ]
            for name, tensor in quantised_tensors(model.load(rule).items(), quantised)
        }
    rows = model.load_rows(rule).items()
    return {name: [block.to(DTYPES[dtypes[name]]) for block in blocks] for name, blocks in rows}


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


def inspect(folder: Path) -> None:
    """Print names, shapes, dtypes, number of parameters and layout of a checkpoint of either kind."""
    if (folder / MARKER).is_file():
        source = StoredCheckpoint(folder)
        for tensor in source.tensors.values():
            name = str(tensor.dtype).removeprefix("torch.")
            print(f"{tensor.key}  {list(tensor.size)}  {name}  {len(tensor.chunks)} pieces")
        marker = source.marker
        layout = ", ".join(f"{axis} {size}" for axis, size in marker["layout"].items())
        stored = sum(TensorSpec("", t.size, "uint8").numel for t in source.tensors.values())
        print(f"Megatron checkpoint ({marker['content']}, step {marker['step']}), cut for {layout}")
        print(f"{len(source.tensors)} tensors, {stored:,} values (vocabulary padding included)")
        if (folder / CONFIG).is_file():
            shapes = WeightMap(read_config(folder)).hf_shapes()
            count = sum(TensorSpec(n, s, "uint8").numel for n, s in shapes.items())
            print(f"{count:,} parameters in {len(shapes)} Hugging Face tensors")
        return
    checkpoint = HfCheckpoint(folder)
    for spec in checkpoint.specs.values():
        print(
            f"{spec.name}  {list(spec.shape)}  {spec.dtype}  {checkpoint.file_of(spec.name).name}"
        )
    numbers = dict.fromkeys(sorted({spec.dtype for spec in checkpoint.specs.values()}), 0)
    for spec in checkpoint.specs.values():
        numbers[spec.dtype] += spec.numel
    files = len({checkpoint.file_of(name) for name in checkpoint.specs})
    names = checkpoint.config.get("architectures") or [checkpoint.config.get("model_type")]
    print(
        f"Hugging Face checkpoint of {names[0]}: {len(checkpoint.specs)} tensors in {files} files, "
        + ", ".join(f"{count:,} values in {dtype}" for dtype, count in numbers.items())
    )


def _opened(folder: Path, like: Path | None) -> tuple[Mapping[str, TensorSpec], Loader]:
    """Open a checkpoint of either kind: (tensor descriptions, loader)."""
    if not (folder / MARKER).is_file():
        source = HfCheckpoint(folder)
        config = {k: v for k, v in source.config.items() if k != "quantization_config"}
        copies = {copy for copy, _ in WeightMap(config).tied_copies()}
        return {n: spec for n, spec in source.specs.items() if n not in copies}, source.load
    model, _ = _stored_model(folder, None if (folder / CONFIG).is_file() else like)
    model.source.check_files(workers=2)
    rules: dict[str, Rule] = {}
    found: dict[str, TensorSpec] = {}
    for rule, specs in model.specs():
        for spec in specs:
            rules[spec.name], found[spec.name] = rule, spec
    return found, lambda name: model.load(rules[name])[name]


def _stored_model(folder: Path, like: Path | None) -> tuple[StoredModel, Path]:
    """Open a Megatron checkpoint: (its weights, folder of its config and tokenizer)."""
    source = StoredCheckpoint(folder)
    origin = like or folder
    if not (origin / CONFIG).is_file():
        raise ConversionError(
            f"{folder} does not say which model it is; give --like HF_DIR, the folder its run began from"
        )
    return StoredModel(source, WeightMap(read_config(origin))), origin


def _identity(folder: Path) -> dict[str, Any]:
    """Fingerprint a folder by the names, sizes and times of change of its files."""
    files = {
        entry.name: [entry.stat().st_size, entry.stat().st_mtime_ns]
        for entry in sorted(os.scandir(folder), key=lambda e: e.name)
        if entry.is_file()
    }
    text = json.dumps(files, sort_keys=True)
    return {"of": str(folder.absolute()), "state": digest(text.encode())}


def _single_dtype(source: HfCheckpoint) -> str:
    stored = {spec.dtype for spec in source.specs.values()}
    for dtype in DTYPE_NAMES.values():
        if stored == {dtype}:
            return dtype
    raise ConversionError(
        f"{source.folder} holds {', '.join(sorted(stored))}; say --dtype bf16 or fp32"
    )


@contextmanager
def _progress(title: str, total: int, workers: int) -> Iterator[Pace]:
    """Show a bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

    columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield Pace(workers, lambda nbytes: bar.advance(task, nbytes))


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

    def add_workers(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--workers", type=int, default=2, help="files written at once (2)")

    command("from-gguf", "llama.cpp file to a Hugging Face folder", "file", "out")
    made = command("to-megatron", "Hugging Face folder to a Megatron checkpoint", "hf_dir", "out")
    for axis in ("tp", "pp", "vpp", "ep"):
        made.add_argument(f"--{axis}", type=int, default=1, help="of the layout it is cut for (1)")
    made.add_argument("--dtype", choices=DTYPE_NAMES, help="default: as stored")
    made.add_argument(
        "--plan",
        action="store_true",
        help="only say what would be written; needs config.json alone",
    )
    add_workers(made)
    made = command("to-hf", "Megatron checkpoint to a Hugging Face folder", "megatron_dir", "out")
    add_like(made)
    made.add_argument("--dtype", choices=[*DTYPE_NAMES, FP8], help="default: as stored")
    made.add_argument("--max-shard-size", type=_bytes, default=5 * 10**9, metavar="SIZE")
    add_workers(made)
    made = command("verify", "compare two checkpoints tensor by tensor", "a", "b")
    add_like(made)
    made.add_argument("--tolerance", type=float, default=0.0, help="0 (default): equal bits")
    command("inspect", "names, shapes, dtypes, number of parameters, layout", "folder")
    return parser.parse_args(argv)


def _run(given: argparse.Namespace) -> int:
    dtype = getattr(given, "dtype", None)
    dtype = DTYPE_NAMES.get(dtype, dtype)
    match given.command:
        case "verify":
            count = verify(given.a, given.b, given.like, given.tolerance)
            print("equal" if count == 0 else f"{count} tensors differ")
            return 1 if count else 0
        case "inspect":
            inspect(given.folder)
            return 0
        case "from-gguf":
            convert_gguf(given.file, given.out)
        case "to-megatron":
            sizes = ParallelSizes(given.tp, given.pp, given.vpp, given.ep)
            if given.plan:
                plan_megatron(given.hf_dir, sizes, dtype)
                return 0
            to_megatron(given.hf_dir, given.out, sizes, dtype, given.workers)
        case "to-hf":
            shard = given.max_shard_size
            to_hf(given.megatron_dir, given.out, given.like, dtype, shard, given.workers)
    print(f"wrote {given.out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one command; returns the exit code."""
    given = _arguments(argv)
    try:
        return _run(given)
    except (ConversionError, RuntimeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
