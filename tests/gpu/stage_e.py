"""The whole loop through the command line: one GPU for trainer and server, then 8B on eight. Not yet run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from record import Record
from server import write_model

REPO = Path(__file__).parents[2]
STEPS = 4


def agpo(record: Record, name: str, verb: str, config: Path, run_dir: Path, *sets: str) -> bool:
    """``agpo-megatron VERB``; whether it ended well."""
    command = [sys.executable, "-m", "agpo_megatron", verb, str(config), "--run-dir", str(run_dir)]
    for value in sets:
        command += ["--set", value]
    done = subprocess.run(command, capture_output=True, text=True, timeout=420)
    ended = done.stderr.strip().splitlines()[-1:] if done.returncode else [""]
    record.check(f"{name}: {verb} ends well", done.returncode == 0, "".join(ended)[:200])
    return done.returncode == 0


def train(
    record: Record, name: str, config: Path, run_dir: Path, *sets: str, steps: int = STEPS
) -> None:
    """``agpo-megatron train``, and what its metrics say."""
    agpo(record, name, "train", config, run_dir, *sets, f"train.steps={steps}")
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    record.check(f"{name}: {steps} steps", len(rows) == steps, f"{len(rows)} are recorded")
    if rows:
        # A step whose groups are all right or all wrong trains no token and compares nothing.
        gaps = [v for row in rows if (v := row.get("rollout/logprob_abs_diff_mean")) is not None]
        record.close(f"{name}: server and trainer agree", max(gaps, default=float("nan")), 0.05)
        for key in ("time/rollout", "time/update", "time/publish"):
            values = [row[key] for row in rows if key in row]
            if values:
                record.figure(f"{name}: {key}", values[-1], "s")


def one_gpu_settings() -> tuple[str, ...]:
    """Trainer and server on one GPU; the weights go through host memory, since NCCL refuses two ranks on a device."""
    engine = importlib.util.find_spec("transformer_engine")
    return (
        "cluster.device=cuda",
        "cluster.publish_backend=gloo",
        "cluster.gpus_per_node=1",
        "cluster.rollout_nodes=0",
        "policy.tensor_parallel=1",
        "policy.pipeline_parallel=1",
        "policy.dtype=bf16",
        f"policy.layers={'auto' if engine else 'local'}",
        "rollout.server_args.mem_fraction_static=0.3",
        "algorithm.loss.correction.kind=tis",
    )


def one_gpu(record: Record, folder: Path) -> None:
    """Random weights of a usual shape: that the loop goes round, not that it learns."""
    from tiny_run import write_run

    path = write_run(folder, **{"data.max_prompt_tokens": 64})
    write_model(folder / "model")
    # Random weights answer wrongly all the time; this preset trains on such groups too.
    sets = (*one_gpu_settings(), "algorithm.preset=agpo_v1")
    train(record, "one GPU, random weights", path, folder / "run", *sets)


def quickstart(record: Record, folder: Path) -> None:
    """The demonstration with its cold start: its data and its first weights are made here."""
    config, sets = REPO / "configs" / "tiny_cpu.yaml", one_gpu_settings()
    verbs = ("prepare", "sft")
    if all(agpo(record, "quickstart", verb, config, folder, *sets) for verb in verbs):
        train(record, "quickstart", config, folder, *sets, steps=10)


def smollm2(record: Record) -> None:
    """A real model, whose weights have been fetched before."""
    name, config = "SmolLM2", REPO / "configs" / "smollm2_cpu.yaml"
    folder = Path(os.environ.get("AGPO_SMOLLM2_RUN", "runs/smollm2_cpu"))
    if (folder / "smollm2" / "config.json").exists():
        train(record, name, config, folder.absolute(), *one_gpu_settings())
    else:
        why = f"{folder} is not prepared (agpo-megatron prepare {config.name} --run-dir DIR); set AGPO_SMOLLM2_RUN"
        record.skip(name, why)


def eight_gpus(record: Record, folder: Path) -> None:
    import torch

    model = os.environ.get("AGPO_8B_MODEL", "models/DeepSeek-R1-Distill-Llama-8B")
    data = os.environ.get("AGPO_8B_DATA", "data/train.jsonl")
    name = "8B, four GPUs train and four serve"
    if torch.cuda.device_count() < 8:
        record.skip(name, f"needs 8 GPUs, there are {torch.cuda.device_count()}")
    elif not (Path(model) / "config.json").exists() or not Path(data).exists():
        record.skip(name, f"no {model} or no {data}; set AGPO_8B_MODEL and AGPO_8B_DATA")
    else:
        config = REPO / "configs" / "agpo_8b.yaml"
        short = ("train.prompts_per_batch=8", "rollout.max_response_tokens=1024")
        sets = (f"model.path={model}", f"data.path={data}", "eval.sets=[]")
        train(record, name, config, folder, *sets, *short)


def main() -> None:
    record = Record(Path(sys.argv[2]))
    with tempfile.TemporaryDirectory() as folder:
        one_gpu(record, Path(folder) / "tiny")
        smollm2(record)
        quickstart(record, Path(folder) / "quickstart")
        eight_gpus(record, Path(folder) / "8b")


if __name__ == "__main__":
    main()
