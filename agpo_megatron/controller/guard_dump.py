"""Dump of a guard's finding, the folder ``RUN/guards/step-N/``: what a replay needs to meet it again.

It is a run folder: configuration, the batches since the checkpoint that the replay begins from, their samples, and
that checkpoint; all files are hard links, so it costs no space until the run prunes its own. The newest few stay.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from agpo_megatron.config.record import resolved_yaml
from agpo_megatron.config.run_folder import RunFolder
from agpo_megatron.config.schema import Config
from agpo_megatron.files import WriteError, rename_durably, write_durably
from agpo_megatron.journal import JournalReader, StepVerdict
from agpo_megatron.journal.reader import ValidFiles, valid_files
from agpo_megatron.journal.verdicts import encode_verdict
from agpo_megatron.journal.writer import inventory, owner_name

KEPT = 4
"""Dumps of a run: a whole ladder of actions. Each may hold the space of a checkpoint that the run has pruned."""


def finding_path(folder: Path) -> Path:
    return folder / "finding.json"


def dumped_step(folder: Path) -> int | None:
    """Return the step up to which a replay of ``folder`` goes if it is a dump; None if it is a run."""
    path = finding_path(folder)
    return int(json.loads(path.read_text())["step"]) if path.exists() else None


def replay_command(dump: Path) -> str:
    """Return the command that reproduces a dump."""
    return f"agpo-megatron train {dump}/config.yaml --replay {dump} --run-dir NEW"


def write_dump(
    run: RunFolder, config: Config, verdict: StepVerdict, checkpoint: tuple[int, Path | None]
) -> Path:
    """Write the dump of ``verdict``, before it is acted on; one that is there already stays. The newest ``KEPT``
    are kept.

    ``checkpoint``: step and folder that the replay begins from; None: the initial weights. Raises WriteError.
    """
    target = run.dump(verdict.step)
    if target.exists():
        return target
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        _fill(RunFolder(partial), run, config, verdict, checkpoint)
        rename_durably(partial, target)
    except OSError as error:
        raise error if isinstance(error, WriteError) else WriteError(target, error) from error
    dumps = target.parent.glob("step-*")
    for path in sorted(dumps, key=lambda path: int(path.name.removeprefix("step-")))[:-KEPT]:
        shutil.rmtree(path, ignore_errors=True)
    return target


def _fill(
    dump: RunFolder,
    run: RunFolder,
    config: Config,
    verdict: StepVerdict,
    checkpoint: tuple[int, Path | None],
) -> None:
    start, weights = checkpoint
    reader, valid = JournalReader(run.journal), valid_files(run.journal)
    batches = [b for b in reader.batches() if b.last_step > start and b.first_step <= verdict.step]
    records = [reader.record(batch.name) for batch in batches]
    segments = {block.file for record in records for block in record.samples}
    details = {block.file for record in records for block in record.details if block}
    verdicts = [n for n in valid.verdicts if int(n.split("-")[1]) < verdict.step]
    names = [batch.name for batch in batches]
    for place, files in (
        ("samples", segments),
        ("batches", {*names, *details}),
        ("verdicts", verdicts),
        ("fragments", ()),
    ):
        (dump.journal / place).mkdir(parents=True)
        for name in files:
            _link(run.journal / place / name, dump.journal / place / name)
    kept = ValidFiles(sorted(segments), names, [], verdicts)
    write_durably(dump.journal / owner_name(1), inventory(kept))
    if weights is not None:
        shutil.copytree(weights, dump.checkpoint(start), copy_function=_link)
    write_durably(dump.config, resolved_yaml(config).encode())
    write_durably(finding_path(dump.path), encode_verdict(verdict))


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
