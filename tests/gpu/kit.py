"""Runs the stages, each in a process of its own with its own time limit, and writes one report. See run.sh."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import machine
import record

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Stage:
    """``limit``: seconds, after which it is stopped and what it had found is reported."""

    key: str
    title: str
    limit: float


STAGES = (
    Stage("a", "log-prob head: correctness, time, memory", 420),
    Stage("b", "policy on one rank: parity, updates, resume", 450),
    Stage("c", "Transformer Engine: layers, THD, FP8 recipes", 420),
    Stage("d", "SGLang: generation, log-probs, publishing", 450),
    Stage("e", "the whole loop", 470),
    Stage("f", "eight GPUs: layouts over NCCL, publish bandwidth", 470),
)


def run_stage(stage: Stage, here: dict[str, Any], device: str, out: Path) -> dict[str, Any]:
    """One line of the report: status is passed, failed or skipped."""
    line: dict[str, Any] = {"stage": stage.key, "title": stage.title, "seconds": 0.0}
    if reason := machine.missing(stage.key, here, device):
        return {**line, "status": "skipped", "reason": reason, "entries": []}
    entries, log = out / f"stage_{stage.key}.json", out / f"stage_{stage.key}.log"
    entries.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / f"stage_{stage.key}.py"), device, str(entries)]
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(stage.limit)
            reason = "" if code == 0 else last_line(log) or f"exit code {code}"
        except subprocess.TimeoutExpired:
            reason = f"stopped after its limit of {stage.limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what it left behind
            process.wait()
    found = record.load(entries)
    wrong = [e["name"] for e in found if e["ok"] is False]
    if wrong and not reason:
        reason = f"did not hold: {', '.join(wrong)}"
    if not found and not reason:
        reason = "reported nothing"
    line["seconds"] = round(time.monotonic() - began, 1)
    return {**line, "status": "failed" if reason else "passed", "reason": reason, "entries": found}


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


def markdown(report: dict[str, Any]) -> str:
    """The report as a page: the machine, one line per stage, then every figure."""
    here = report["machine"]
    gpus = ", ".join(f"{n} x {name}" for name, n in counted(g[0] for g in here["gpus"]).items())
    lines = [
        f"# GPU report of {report['date']}",
        "",
        f"Commit {report['commit']}, device {report['device']}; {gpus or 'no GPU'}; driver {here['driver']}.",
        "",
        "| environment | versions |",
        "|---|---|",
    ]
    for kind in ("train", "rollout"):
        versions = ", ".join(f"{k} {v}" for k, v in here[kind]["versions"].items())
        lines.append(f"| {kind} | {versions or 'none'} |")
    lines += ["", "| stage | what | result | seconds | |", "|---|---|---|---|---|"]
    for s in report["stages"]:
        cells = (s["stage"], s["title"], s["status"], f"{s['seconds']:.0f}", s["reason"])
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    for s in report["stages"]:
        if s["entries"]:
            lines += ["", f"## {s['stage']}: {s['title']}", "", "| | | |", "|---|---|---|"]
            lines += [f"| {e['name']} | {shown(e)} | {e['detail']} |" for e in s["entries"]]
    return "\n".join(lines) + "\n"


def shown(entry: dict[str, Any]) -> str:
    mark = {True: "holds", False: "**does not hold**", None: ""}[entry["ok"]]
    if entry["kind"] == "part":
        return "skipped"
    if entry["value"] is None:
        return mark
    return f"{entry['value']:.4g} {entry['unit']} {mark}".strip().replace("  ", " ")


def counted(names: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in names:
        found[name] = found.get(name, 0) + 1
    return found


def commit() -> str:
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/gpu/run.sh", description=__doc__)
    parser.add_argument("--stages", default="abcdef", help="letters of the stages to run")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu_report"), help="folder of the report")
    options = parser.parse_args()
    if unknown := set(options.stages) - {s.key for s in STAGES}:
        parser.error(f"no stage {', '.join(sorted(unknown))}")
    options.out.mkdir(parents=True, exist_ok=True)
    here = machine.describe()
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": options.device,
        "machine": here,
        "stages": [],
    }
    for stage in STAGES:
        if stage.key not in options.stages:
            continue
        line = run_stage(stage, here, options.device, options.out)
        report["stages"].append(line)
        (options.out / "gpu_report.json").write_text(json.dumps(report, indent=1))
        (options.out / "gpu_report.md").write_text(markdown(report))
        why = f": {line['reason']}" if line["reason"] else ""
        sys.stdout.write(
            f"{stage.key}  {line['status']:8}{line['seconds']:6.0f} s  {stage.title}{why}\n"
        )
        sys.stdout.flush()
    sys.stdout.write(f"report: {options.out / 'gpu_report.md'}\n")
    return int(any(s["status"] == "failed" for s in report["stages"]))


if __name__ == "__main__":
    sys.exit(main())
