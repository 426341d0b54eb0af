"""Eight GPUs: every axis of the layout over NCCL against the fp64 reference, and how fast weights travel.

Not yet run.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))
from one_rank import activate, case_of, result_of
from record import Record

WORLD = 8
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP 2 x DP 4": {"tensor_parallel": 2, "data_parallel": 4, "sequence_parallel": True},
    "TP 4 x DP 2": {"tensor_parallel": 4, "data_parallel": 2, "sequence_parallel": True},
    "TP 8": {"tensor_parallel": 8, "sequence_parallel": True},
    "TP 2 x PP 4": {"tensor_parallel": 2, "pipeline_parallel": 4},
    "PP 2 x VPP 2 x DP 4": {"pipeline_parallel": 2, "virtual_pipeline": 2, "data_parallel": 4},
    "TP 2 x CP 2 x DP 2": {"tensor_parallel": 2, "context_parallel": 2, "data_parallel": 2},
    "TP 2 x PP 2 x CP 2": {"tensor_parallel": 2, "pipeline_parallel": 2, "context_parallel": 2},
    "TP 2 x EP 4": {
        "tensor_parallel": 2,
        "expert_parallel": 4,
        "data_parallel": 4,
        "sequence_parallel": True,
    },
}
BUCKET = 512 * 1024**2


def model_of(name: str) -> dict[str, Any]:
    """Widths that eight ranks divide; experts where the layout shares them out."""
    from agpo_megatron.parity.models import LLAMA3, MIXTRAL

    wide = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8}
    return {**(MIXTRAL if "EP" in name else LLAMA3), **wide, "num_key_value_heads": 8}


def execute(rank: int, folder: str, name: str, port: int) -> None:
    """One rank of one layout; writes what it found."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    activate("cuda", "auto" if importlib.util.find_spec("transformer_engine") else "local")
    from agpo_megatron.policy.policy import Policy

    case = torch.load(f"{folder}/case.pt", weights_only=False)
    policy = Policy.build(
        case.hf_dir, case.policy, case.train, temperature=case.temperature, seed=case.seed
    )
    torch.save(result_of(policy, case), f"{folder}/found.{rank}.pt")
    torch.distributed.destroy_process_group()


def layout(record: Record, folder: Path, name: str, axes: dict[str, Any], dtype: str) -> None:
    from agpo_megatron.cluster.processes import free_port
    from agpo_megatron.config.schema import PolicyConfig
    from agpo_megatron.parity.cases import merged
    from agpo_megatron.parity.comparison import BF16, FP32, deviations

    folder.mkdir()
    engine = importlib.util.find_spec("transformer_engine")
    policy = PolicyConfig(dtype=dtype, layers="auto" if engine else "local", **axes)  # type: ignore[arg-type]
    case, expected, weights = case_of(folder / "hf", model_of(name), policy)
    torch.save(case, folder / "case.pt")
    mp.spawn(execute, args=(str(folder), name, free_port()), nprocs=WORLD)
    outcomes = [torch.load(folder / f"found.{r}.pt", weights_only=False) for r in range(WORLD)]
    limits = FP32 if dtype == "fp32" else BF16
    for found in deviations(merged(outcomes), expected, weights, case.train, limits):
        record.close(f"{name} {dtype}: {found.quantity}", found.error, found.limit)


def broadcast(rank: int, folder: str, port: int) -> None:
    """Seconds for a bucket of weights from rank 0 to the others, as a publish sends it."""
    import torch.distributed as dist

    torch.cuda.set_device(rank)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("nccl", init_method=address, rank=rank, world_size=WORLD)
    flat = torch.zeros(BUCKET, dtype=torch.uint8, device="cuda")
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize()
        began = time.perf_counter()
        dist.broadcast(flat, 0)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    if rank == 0:
        Path(folder, "seconds").write_text(str(min(seconds[1:])))
    dist.destroy_process_group()


def main() -> None:
    record = Record(Path(sys.argv[2]))
    from agpo_megatron.cluster.processes import free_port

    engine = importlib.util.find_spec("transformer_engine")
    # Transformer Engine's attention has no fp32.
    dtype = "bf16" if engine else "fp32"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mp.spawn(broadcast, args=(name, free_port()), nprocs=WORLD)
        seconds = float((folder / "seconds").read_text())
        record.figure("publish of 512 MiB to 7 GPUs", BUCKET / seconds / 1e9, "GB/s")
        for number, (what, axes) in enumerate(LAYOUTS.items()):
            try:
                layout(record, folder / str(number), what, axes, dtype)
            except Exception as error:  # the next layout must still be tried
                record.check(f"{what} {dtype}: runs", False, str(error).strip()[-200:])


if __name__ == "__main__":
    main()
