"""A checkpoint on its way to disk, while training goes on: snapshot, files by threads, marker last.

Megatron-Core plans the files and copies nothing that it need not; its own callers then write in a process, which is
forked (beside the threads of gloo and OpenMP, which no fork survives) or spawned with CUDA only, and may outlive its
owner. Here threads of the rank write, through Megatron's own writer: file system calls and checksums release the
interpreter, and with their process they end.
"""

from __future__ import annotations

import inspect
import json
import queue
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from agpo_megatron.files import sync
from agpo_megatron.policy import backend
from agpo_megatron.policy.marker import (
    FORMAT,
    MARKER,
    CheckpointError,
    digest,
    write_marker,
)
from agpo_megatron.policy.parallel import Layout
from agpo_megatron.policy.together import checked_marker, together
from agpo_megatron.wait import WaitExpired, waiting

ITEM_OVERHEAD = 8192
"""Bytes of a file beside a tensor's own: headers, padding, its line in the metadata; a generous bound."""

# Megatron switches the garbage collector off while it writes, for processes that share CUDA tensors. Threads write host
# memory, and training should not go without for so long.
_write_file = inspect.unwrap(FileSystemWriterAsync.write_preloaded_data)


class PendingSave:
    """One save. ``begin``, ``done`` and ``finish`` are collective: every rank calls them, in the same order.

    ``bytes``: of this rank's files, about. ``seconds``: from the begin until this rank's last file was on disk.
    """

    def __init__(self, target: Path, layout: Layout, facts: dict[str, Any]) -> None:
        self.target, self._layout, self._facts = target, layout, facts
        self._partial = target.with_name(f".{target.name}.partial")
        self._request: Any = None
        self._threads: list[Thread] = []
        self._results: dict[int, Any] = {}
        self._digests: dict[str, list[int]] = {}
        self._failures: list[str] = []
        self._started = time.monotonic()
        self.bytes, self.seconds = 0, 0.0

    def begin(self, state_of: Callable[[], dict[str, Any]], strategy: Any, *, copy: bool) -> None:
        """Take the state and start to write it. ``copy``: the caller goes on to change it meanwhile.

        Raises CheckpointError, on every rank, when there is not enough room: nothing is written then.
        """
        if _holds(self.target, self._layout, self._facts):
            return
        partial, rank = self._partial, self._layout.rank
        self._together("preparing", lambda: _fresh_folder(partial) if rank == 0 else None)
        # Megatron would start a manager process (importing the whole program again) to carry results between threads of
        # this very process; a queue is enough.
        filesystem_async._results_queue = queue.Queue()
        with backend.current().scope():
            state = state_of()
            taken = _storages(state)
            self._request = self._together(
                "planning",
                lambda: dist_checkpointing.save(
                    state,
                    str(partial),
                    strategy,
                    async_sharded_save=True,
                    async_strategy="mcore",
                    content_metadata={"format": FORMAT},
                ),
                share=False,
            )[0]
        buckets = self._buckets()
        sizes = [_bytes_of(bucket) for bucket in buckets]
        self.bytes = sum(sizes)
        need = sum(together(self._layout, f"planning {self.target}", lambda: self.bytes))
        try:
            self._together("looking for room", lambda: _check_room(self.target, need))
        except CheckpointError:
            self._remove_partial()
            raise
        self._together("copying", lambda: _take(buckets, taken if copy else []))
        for number, bucket in enumerate(buckets):
            thread = Thread(
                target=self._write, args=(number, bucket), name=f"save-{number}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def done(self) -> bool:
        """Say whether every rank has written its files, or failed to."""
        alive = any(thread.is_alive() for thread in self._threads)
        return not any(together(self._layout, f"writing {self.target}", lambda: alive))

    def finish(self, seconds: float) -> None:
        """Wait until every rank has written its files, then write the marker: now it is a checkpoint.

        Raises CheckpointError on every rank, naming path and cause, when any could not write (within ``seconds``);
        what was written is removed then.
        """
        if self._request is None:
            return
        try:
            self._together("writing", lambda: self._join(seconds))
            with backend.current().scope():
                self._together("completing", self._finalize)
            shares = self._together("completing", lambda: self._digests)
            files = {name: value for share in shares for name, value in share.items()}
            self._together("completing", lambda: self._complete(files))
        except CheckpointError:
            self._remove_partial()
            raise
        finally:
            self._request = None

    def _buckets(self) -> list[Any]:
        """One entry per file, [path, name, ([(item, bytes)], [(item, tensor)])]; the list is Megatron's own."""
        return self._request.async_fn_args[1] if self._request.async_fn_args else []

    def _write(self, number: int, bucket: Any) -> None:
        """Write one file, sync and digest it: the work of a thread."""
        path, name, (_, tensors) = bucket
        try:
            transforms = self._request.async_fn.args[0]
            _, outcome = _write_file(transforms, number, bucket, None, None, use_fsync=True)
            tensors.clear()  # the snapshot of this file is on disk
            if isinstance(outcome, Exception):
                raise outcome
            self._digests[name] = digest(Path(path))
            self._results[number] = outcome
        except Exception as error:
            cause = _first(error)
            self._failures.append(f"{type(cause).__name__}: {cause}")
        self.seconds = time.monotonic() - self._started

    def _join(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with waiting(f"the files of checkpoint {self.target}", seconds):
            for thread in self._threads:
                thread.join(max(0.0, deadline - time.monotonic()))
                if thread.is_alive():
                    raise WaitExpired(f"the files of checkpoint {self.target}", seconds)
        if self._failures:
            raise CheckpointError(
                f"cannot write checkpoint {self.target}: {self._failures[0]}. Nothing committed is lost: free space or "
                "mend the file system, then run the same command again"
            )

    def _finalize(self) -> None:
        """Megatron's own end of a save: metadata from what every rank has written."""
        if self._results:
            self._request.async_fn_args[2].put(self._results)
        for finalize in self._request.finalize_fns:
            finalize()

    def _complete(self, files: dict[str, list[int]]) -> None:
        if self._layout.rank != 0:
            return
        for path in self._partial.iterdir():
            if path.name not in files:  # Megatron's metadata
                files[path.name] = digest(path)
                sync(path)
        write_marker(self._partial, self._layout.sizes(), files, self._facts)
        _publish(self._partial, self.target)

    def _remove_partial(self) -> None:
        if self._layout.rank == 0:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _together(self, what: str, action: Callable[[], Any], *, share: bool = True) -> list[Any]:
        return together(self._layout, f"{what} {self._partial}", action, share=share)


def _first(error: BaseException) -> BaseException:
    """Return the error that this one came of: torch says "unexpected pos" where the system said that a disk is full."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _bytes_of(bucket: Any) -> int:
    _, _, (data, tensors) = bucket
    held = sum(stream.getbuffer().nbytes for _, stream in data)
    held += sum(tensor.nbytes for _, tensor in tensors)
    return int(held) + ITEM_OVERHEAD * (len(data) + len(tensors))


def _storages(state: dict[str, Any]) -> list[torch.UntypedStorage]:
    """Storages of the tensors that training may go on to change (and of some that it does not know)."""
    tensors = [getattr(part, "data", None) for part in nested_values(state)]
    return [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor)]


def _take(buckets: list[Any], shared: list[torch.UntypedStorage]) -> None:
    """Bring the tensors of every file to host memory, in place of those that are there; copy what lies in a ``shared``
    storage. Megatron's plan has cloned views of larger storages already."""
    places = {storage.data_ptr() for storage in shared}

    def take(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("cpu", copy=tensor.untyped_storage().data_ptr() in places)

    for number, (path, name, (data, tensors)) in enumerate(buckets):
        buckets[number] = (path, name, (data, [(item, take(tensor)) for item, tensor in tensors]))


def _check_room(target: Path, need: int) -> None:
    """Raise CheckpointError unless the file system of ``target`` has ``need`` bytes for it."""
    free = shutil.disk_usage(target.parent).free
    if need > free:
        raise CheckpointError(
            f"not enough room for checkpoint {target}: it needs {need} bytes, {free} are free there. Nothing was "
            "written, no older checkpoint was removed, nothing committed is lost: free space, then run the same "
            "command again"
        )


def _fresh_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _publish(partial: Path, target: Path) -> None:
    if target.exists():  # nothing that could be loaded: ``_holds`` has looked
        (target / MARKER).unlink(missing_ok=True)
        shutil.rmtree(target)
    partial.rename(target)
    sync(target.parent)


def _holds(target: Path, layout: Layout, facts: dict[str, Any]) -> bool:
    """Return whether ``target`` is an undamaged checkpoint of the same content, step and extra. All ranks together,
    with one answer. Raises CheckpointError if it is an undamaged checkpoint of something else."""
    try:
        marker = checked_marker(target, layout)
    except CheckpointError:
        return False
    if any(marker.get(key, value) != value for key, value in json.loads(json.dumps(facts)).items()):
        raise CheckpointError(
            f"{target} is a complete checkpoint ({marker['content']}, step {marker['step']}) of something else than is "
            f"to be saved ({facts['content']}, step {facts['step']}); save to another folder or remove it"
        )
    return True
