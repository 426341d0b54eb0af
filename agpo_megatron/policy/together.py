"""One answer of all ranks: an action that fails on any of them fails on all, with the same error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from agpo_megatron.policy.marker import (
    CheckpointDamaged,
    CheckpointError,
    check_file,
    read_marker,
)
from agpo_megatron.policy.parallel import Layout


def together(
    layout: Layout, what: str, action: Callable[[], Any], *, share: bool = True
) -> list[Any]:
    """Run ``action`` on every rank; if it fails on any, raise the same CheckpointError (or CheckpointDamaged) on all
    instead of leaving the others waiting. Returns all ranks' results in rank order, or (``share=False``) only this
    rank's own."""
    result, failure, damaged = None, "", False
    try:
        result = action()
    except CheckpointError as error:
        failure, damaged = str(error), isinstance(error, CheckpointDamaged)
    except CheckpointException as error:  # not an Exception; its text is every rank's traceback
        causes = {str(cause) for cause, _ in error.failures.values()}
        failure = f"{what}: {'; '.join(sorted(causes))}"
    except Exception as error:
        failure = f"{what}: {type(error).__name__}: {error}"
    reports: list[Any] = [None] * layout.world
    dist.all_gather_object(
        reports, (failure, damaged, result if share else None), group=layout.control_group
    )
    failed = [(rank, text, damaged) for rank, (text, damaged, _) in enumerate(reports) if text]
    if failed:
        rank, text, damaged = failed[0]
        kind = CheckpointDamaged if damaged else CheckpointError
        raise kind(text if rank == layout.rank else f"{text} (on rank {rank})")
    return [value for *_, value in reports] if share else [result]


def checked_marker(source: Path, layout: Layout) -> dict[str, Any]:
    """The marker, after the ranks together have compared every file with it."""
    marker = together(layout, f"reading {source}", lambda: read_marker(source))[layout.rank]
    together(layout, f"checking {source}", lambda: _check_share(source, marker, layout))
    return dict(marker)


def _share(files: Sequence[str], layout: Layout) -> list[str]:
    """Each rank looks after every world-th file."""
    return sorted(files)[layout.rank :: layout.world]


def _check_share(folder: Path, marker: dict[str, Any], layout: Layout) -> None:
    for name in _share(list(marker["files"]), layout):
        check_file(folder, name, marker["files"][name])
