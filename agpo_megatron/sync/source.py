"""The trainer's end of a publish: one pipeline stage's update group with the rollout servers, torch only.

The group is SGLang's (srt/utils/common.py ``init_custom_process_group``), joined here with public torch API: the same
store keys, rank 0 of ``world_size``. The broadcasting rank is TP0, CP0, DP0 of its stage; no tensor crosses stages.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from agpo_megatron.conversion.shape import DTYPES, TensorSpec
from agpo_megatron.rollout.checksum import ServerChecksums
from agpo_megatron.rollout.excerpts import excerpt_digest
from agpo_megatron.sync.messages import StageReport
from agpo_megatron.wait import WaitExpired, waiting

log = logging.getLogger(__name__)
IN_FLIGHT = 2
"""Buckets held at once: one being sent while the next is prepared."""
ENDING_SECONDS = 1.0
"""For the sending thread to report, once the last broadcast has ended or passed its deadline."""
DIGEST_CHUNK = 1 << 22
"""64-bit words hashed at once: bounds the digest's scratch memory at 32 MB."""

ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"

Bucket = Sequence[tuple[str, Tensor]]


def bucketed(
    tensors: Iterable[tuple[str, Tensor]], plan: Sequence[Sequence[TensorSpec]]
) -> Iterator[Bucket]:
    """Group a stage's tensors into the buckets that the controller announces to the servers (``conversion.buckets``).

    Casts to the announced dtype. Raises ValueError, before anything of the bucket is sent, when names or shapes differ.
    """
    source = iter(tensors)
    for specs in plan:
        bucket = []
        for spec in specs:
            name, tensor = next(source, ("nothing", torch.empty(0)))
            if (name, tuple(tensor.shape)) != (spec.name, tuple(spec.shape)):
                raise ValueError(
                    f"the publish manifest expects {spec.name} {tuple(spec.shape)}, "
                    f"the policy gives {name} {tuple(tensor.shape)}"
                )
            bucket.append((name, tensor.detach().to(DTYPES[spec.dtype])))
        yield bucket
    left = next(source, None)
    if left is not None:
        raise ValueError(f"the publish manifest ends before {left[0]}, which the policy gives")


class WeightSource:
    """Opens, uses and closes the update group of one stage; at most one is open.

    ``device``: "cpu" (gloo) or "cuda" (NCCL). ``server_checksums``: also compute what a server reports for these
    weights (CPU servers of tensor parallel size 1 only).
    """

    def __init__(self, device: str, server_checksums: bool) -> None:
        self._device = device
        self._server_checksums = server_checksums
        self._store: dist.TCPStore | None = None
        self._group: Any = None
        self._joining: threading.Thread | None = None
        self._join_error: Exception | None = None

    def open(self, host: str, name: str, world_size: int, timeout: float) -> int:
        """Offer a group called ``name`` at ``host``; returns its port at once, members join in the background.

        ``timeout``: seconds for the members to join.
        """
        self.close()
        limit = datetime.timedelta(seconds=timeout)
        store = dist.TCPStore(
            host, 0, world_size, is_master=True, timeout=limit, wait_for_workers=False
        )
        self._store, self._join_error = store, None
        self._joining = threading.Thread(
            target=self._join, args=(host, store.port, name, world_size, limit), daemon=True
        )
        self._joining.start()
        return store.port

    def _join(
        self, host: str, port: int, name: str, world_size: int, limit: datetime.timedelta
    ) -> None:
        joining = threading.current_thread()
        try:
            # A client of its own: ``close`` can end the store while this thread, and the servers, wait in it.
            store = dist.TCPStore(
                host, port, world_size, is_master=False, timeout=limit, wait_for_workers=False
            )
            # The prefixes that init_custom_process_group and torch's _new_process_group_helper put before every key.
            keys = dist.PrefixStore(f"{name}/", dist.PrefixStore(name, store))
            keys = dist.PrefixStore(f"{self._device}/", keys)
            group = _backend(self._device, keys, world_size, limit)
        except Exception as error:
            if self._joining is joining:
                self._join_error = error
            return
        if self._joining is joining:  # not closed or opened anew meanwhile
            self._group = group

    def close(self) -> None:
        """Leave the group. Members that join, or wait in a broadcast, fail at once with a closed connection."""
        group = self._group
        self._store = self._group = self._joining = None
        if group is not None and self._device == "cuda":
            # A kernel that waits for a lost member holds its thread otherwise. Never run on a GPU yet.
            ending = threading.Thread(target=group.abort, daemon=True)
            ending.start()
            ending.join(ENDING_SECONDS)

    def refuse(self, reason: str) -> StageReport:
        """Send nothing; closes the group, so that members already waiting for the first bucket fail at once."""
        self.close()
        return StageReport("", error=reason)

    def broadcast(
        self, buckets: Iterator[Bucket], seconds: float, excerpts: Mapping[str, int] | None = None
    ) -> StageReport:
        """Send all buckets, each as one uint8 broadcast; SGLang: load_format ``flattened_bucket``.

        The calling thread draws ``buckets`` (which may itself gather over TP) and copies them flat; another thread runs
        the collectives. ``buckets`` is always drawn to its end (or its own failure), since other ranks take part in its
        gathers. ``excerpts``: of how many leading rows, by tensor, to report a digest. Failures, the deadline included,
        come back in ``error``, after which the group is closed.
        """
        started = time.monotonic()
        sender = _Sender(self._joined_group, started + seconds, self._device)
        digest = hashlib.sha256()
        checksums = ServerChecksums() if self._server_checksums else None
        total, read = 0, dict[str, str]()
        with waiting("publish: broadcast of the weights", seconds):
            with sender.stopped_by_errors():
                for bucket in buckets:
                    if sender.error:
                        continue
                    with sender.stopped_by_errors():
                        flat = self.flatten(bucket)
                        total += flat.numel()
                        sender.put(flat)
                        for name, tensor in bucket:
                            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                            if checksums is not None:
                                checksums.add(name, tensor)
                            if rows := (excerpts or {}).get(name):
                                read[name] = excerpt_digest(tensor[:rows].float().cpu())
                        digest.update(word_sum(flat).to_bytes(8, "little"))
            sender.finish()
        took = time.monotonic() - started
        if sender.error:
            self.close()
            log.error("publish: %s", sender.error)
            return StageReport("", total, took, error=sender.error)
        return StageReport(
            digest.hexdigest()[:16],
            total,
            took,
            checksums.result() if checksums else None,
            read,
        )

    def flatten(self, bucket: Bucket) -> Tensor:
        """The bytes of the bucket's tensors, one after the other: uint8 ``[sum of nbytes]``, a copy."""
        return torch.cat(
            [t.to(self._device).contiguous().view(-1).view(torch.uint8) for _, t in bucket]
        )

    def _joined_group(self, seconds: float) -> Any:
        """The group, once all members have joined."""
        joining = self._joining  # close() may forget it meanwhile
        if joining is None:
            raise RuntimeError("no update group is open")
        joining.join(seconds)
        if joining.is_alive():
            raise WaitExpired("the rollout servers to join the update group", seconds)
        if self._join_error is not None:
            raise self._join_error
        assert self._group is not None
        return self._group


class _Sender:
    """Broadcasts flat buckets, in order, in a thread of its own. ``error``: why it stopped, or "".

    On a GPU (none of these lines has run on one yet) it has a stream of its own, so that the next bucket is prepared on
    the caller's stream meanwhile.
    """

    def __init__(self, group: Callable[[float], Any], deadline: float, device: str) -> None:
        self.error = ""
        self._stream = torch.cuda.Stream() if device == "cuda" else None
        self._get_group = group
        self._deadline = deadline
        self._slots = threading.Semaphore(IN_FLIGHT)
        self._queue: queue.Queue[tuple[Tensor, torch.cuda.Event | None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _left(self) -> float:
        return max(0.001, self._deadline - time.monotonic())

    def put(self, flat: Tensor) -> None:
        """Hand a bucket over; blocks while ``IN_FLIGHT`` are unsent."""
        if not self._slots.acquire(timeout=self._left()):
            self.error = self.error or "the broadcast did not end before its deadline"
        if not self.error:
            self._queue.put(
                (flat, torch.cuda.current_stream().record_event() if self._stream else None)
            )

    @contextmanager
    def stopped_by_errors(self) -> Iterator[None]:
        """An exception inside becomes ``error``."""
        try:
            yield
        except Exception as error:
            log.exception("publish: the weights could not be prepared")
            self.error = self.error or f"the weights could not be prepared: {error}"

    def finish(self) -> None:
        """Return once all is sent or ``error`` says why not; the thread ends then, or when the group is closed."""
        self._queue.put(None)
        self._thread.join(ENDING_SECONDS + (0 if self.error else self._left()))
        if self._thread.is_alive():
            self.error = self.error or "the broadcast did not end before its deadline"

    def _run(self) -> None:
        try:
            if self._stream:
                torch.cuda.set_device(
                    self._stream.device
                )  # the current device is each thread's own
            group = self._get_group(self._left())
            while (item := self._queue.get()) is not None and not self.error:
                self._broadcast(group, *item)
                self._slots.release()
        except Exception as error:
            self.error = self.error or f"broadcast to the rollout servers failed: {error}"
            self._slots.release()

    def _broadcast(self, group: Any, flat: Tensor, ready: torch.cuda.Event | None) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        if self._stream is None or ready is None:
            # Gloo ends it by closing its connections, which releases the members too. NCCL's watchdog would end the
            # process: there only ``close`` ends it.
            options.timeout = datetime.timedelta(seconds=self._left())
            group.broadcast([flat], options).wait()
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            flat.record_stream(self._stream)
            group.broadcast([flat], options).wait()
            self._stream.synchronize()


def word_sum(flat: Tensor) -> int:
    """Checksum of bytes: sum over the 64-bit words w_i (zero padded) of (2i + 1) w_i, modulo 2**64.

    The odd factors make it sensitive to every bit and to order; it runs at memory speed on any device.
    """
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    words = flat.view(torch.int64)
    total = 0
    for start in range(0, words.numel(), DIGEST_CHUNK):
        part = words[start : start + DIGEST_CHUNK]
        index = torch.arange(start, start + part.numel(), device=flat.device)
        total += int((part * (2 * index + 1)).sum())  # int64 arithmetic wraps
    return total % 2**64


def _backend(device: str, store: dist.Store, world_size: int, limit: datetime.timedelta) -> Any:
    """Rank 0 of a gloo or NCCL group; returns once all have joined (NCCL: at the first collective)."""
    if device == "cpu":
        return dist.ProcessGroupGloo(store, 0, world_size, limit)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    with _no_error_handling():
        return dist.ProcessGroupNCCL(store, 0, world_size, options)


@contextmanager
def _no_error_handling() -> Iterator[None]:
    """A group made inside leaves its errors to this module, which has deadlines of its own. With torch's default (3)
    the watchdog of a group whose member was lost ends the process, here the trainer; each group reads the variable when
    it is made, so the trainer's others keep the default."""
    before = os.environ.get(ERROR_HANDLING)
    os.environ[ERROR_HANDLING] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ERROR_HANDLING]
        else:
            os.environ[ERROR_HANDLING] = before
