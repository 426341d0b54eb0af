"""The trainer's end of a publish against a receiver that joins and receives as SGLang does."""

from __future__ import annotations

import datetime
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from agpo_megatron.conversion.shape import TensorSpec
from agpo_megatron.rollout.checksum import ServerChecksums
from agpo_megatron.rollout.excerpts import excerpt_digest
from agpo_megatron.sync.messages import StageReport
from agpo_megatron.sync.source import WeightSource, bucketed, word_sum

pytestmark = pytest.mark.processes


class Receiver(threading.Thread):
    """Rank 1 of the group, with the store prefixes of SGLang's init_custom_process_group."""

    def __init__(self, port: int, name: str, sizes: list[int], world_size: int = 2) -> None:
        super().__init__(daemon=True)
        self._port, self._name, self._world_size = port, name, world_size
        self.buckets = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        self.error = ""
        self.start()

    def run(self) -> None:
        limit = datetime.timedelta(seconds=20)
        size = self._world_size
        store = dist.TCPStore("127.0.0.1", self._port, size, is_master=False, timeout=limit)
        keys = dist.PrefixStore(f"{self._name}/", dist.PrefixStore(self._name, store))
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        try:
            group = dist.ProcessGroupGloo(dist.PrefixStore("cpu/", keys), 1, size, limit)
            for bucket in self.buckets:
                group.broadcast([bucket], options).wait()
        except RuntimeError as error:
            self.error = str(error)


def tensors() -> list[tuple[str, Tensor]]:
    return [("a", torch.randn(4, 3)), ("b", torch.randn(5)), ("c", torch.randn(2, 2, 2))]


def specs(dtype: str = "float32") -> list[list[TensorSpec]]:
    a, b, c = (TensorSpec(n, tuple(t.shape), dtype) for n, t in tensors())
    return [[a, b], [c]]


def sizes(plan: list[list[TensorSpec]]) -> list[int]:
    return [sum(spec.nbytes for spec in bucket) for bucket in plan]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_receivers_get_the_bytes_bucket_by_bucket(dtype: str) -> None:
    source, named, plan = WeightSource("cpu", False), tensors(), specs(dtype)
    receiver = Receiver(source.open("127.0.0.1", "g", 2, 20), "g", 3 * sizes(plan))

    def send() -> StageReport:
        report = source.broadcast(iter(bucketed(named, plan)), 20, {"a": 2, "c": 9, "elsewhere": 1})
        assert report.error == ""
        return report

    report = send()
    assert report.bytes == sum(sizes(plan))
    cast = [t.to(getattr(torch, dtype)) for _, t in named]
    # The group stays open for the next publish, and what is sent has an identity.
    # What is read back is compared with the leading rows of what was sent, not of what it was cast from.
    assert report.excerpts == {
        "a": excerpt_digest(cast[0][:2].tolist()),
        "c": excerpt_digest(cast[2].tolist()),
    }
    assert send().digest == report.digest
    named[2][1][1, 0, 1] += 0.5
    assert send().digest != report.digest
    receiver.join(20)
    assert receiver.error == ""
    first = torch.cat([cast[0].flatten(), cast[1].flatten()])
    assert torch.equal(receiver.buckets[0].view(first.dtype), first)
    last = named[2][1].to(first.dtype).flatten()
    assert torch.equal(receiver.buckets[5].view(first.dtype), last)
    assert not torch.equal(receiver.buckets[3].view(first.dtype), last)
    source.close()


def test_nobody_joins() -> None:
    source = WeightSource("cpu", False)
    source.open("127.0.0.1", "g", 2, 20)
    drawn = []

    def watched() -> Iterator[list[tuple[str, Tensor]]]:
        for bucket in bucketed(tensors() * 1, specs()):
            drawn.append(len(bucket))
            yield list(bucket)

    started = time.monotonic()
    report = source.broadcast(watched(), 0.3)
    assert time.monotonic() - started < 5
    assert "rollout servers to join" in report.error or "deadline" in report.error
    assert drawn == [2, 1]  # drawn to the end: other ranks gather for it
    source.close()


def test_a_receiver_that_leaves_is_an_error_not_a_hang() -> None:
    source, plan = WeightSource("cpu", False), specs()
    receiver = Receiver(source.open("127.0.0.1", "g", 2, 20), "g", [])
    receiver.join(20)  # it joined and has gone
    big = [("x", torch.zeros(4_000_000))]
    report = source.broadcast(iter([big, big, big]), 10)
    assert report.error.startswith("broadcast to the rollout servers failed")
    assert "no update group is open" in source.broadcast(bucketed(tensors(), plan), 5).error


def test_closing_releases_a_waiting_receiver() -> None:
    source = WeightSource("cpu", False)
    receiver = Receiver(source.open("127.0.0.1", "g", 2, 20), "g", [16])
    source._joined_group(20)
    assert source.refuse("holds step 1").error == "holds step 1"
    receiver.join(10)
    assert not receiver.is_alive()
    assert "onnection" in receiver.error  # closed, or reset


def test_closing_releases_who_waits_for_a_member_that_does_not_join() -> None:
    source = WeightSource("cpu", False)
    receiver = Receiver(source.open("127.0.0.1", "g", 3, 20), "g", [16], world_size=3)
    time.sleep(0.3)
    assert receiver.is_alive()
    source.close()
    receiver.join(5)
    assert not receiver.is_alive()
    assert receiver.error


class Hung(threading.Thread):
    """A member that joins and then receives nothing."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._port = port
        self.start()

    def run(self) -> None:
        limit = datetime.timedelta(seconds=20)
        store = dist.TCPStore("127.0.0.1", self._port, 3, is_master=False, timeout=limit)
        keys = dist.PrefixStore("cpu/", dist.PrefixStore("g/", dist.PrefixStore("g", store)))
        self.group = dist.ProcessGroupGloo(keys, 2, 3, limit)


def test_a_hung_member_releases_the_others_at_the_deadline() -> None:
    source, size = WeightSource("cpu", False), 16_000_000
    port = source.open("127.0.0.1", "g", 3, 20)
    receiver, hung = Receiver(port, "g", [size] * 3, world_size=3), Hung(port)
    started = time.monotonic()
    report = source.broadcast(
        iter([[("x", torch.zeros(size, dtype=torch.uint8))] for _ in range(3)]), 1.0
    )
    assert "Timed out" in report.error or "deadline" in report.error
    receiver.join(2)
    assert not receiver.is_alive()  # its group's own limit is 20 s
    assert time.monotonic() - started < 5
    assert "onnection" in receiver.error
    hung.join(5)


def test_weights_that_cannot_be_prepared_are_an_error_and_end_the_sender() -> None:
    drawn, threads = [], set(threading.enumerate())

    def failing() -> Iterator[list[tuple[str, Tensor]]]:
        yield [("a", torch.zeros(4))]
        raise RuntimeError("gather broke")

    def out_of_order() -> Iterator[list[tuple[str, Tensor]]]:
        for name in ("v_proj", "q_proj", "k_proj"):
            drawn.append(name)
            yield [(f"model.layers.0.self_attn.{name}.weight", torch.zeros(2, 2))]

    for buckets, message in ((failing(), "gather broke"), (out_of_order(), "out of order")):
        source = WeightSource("cpu", True)
        receiver = Receiver(source.open("127.0.0.1", "g", 2, 20), "g", [16, 16])
        before = time.monotonic()
        report = source.broadcast(buckets, 20)
        assert time.monotonic() - before < 5
        assert "could not be prepared" in report.error
        assert message in report.error
        receiver.join(5)
        assert not receiver.is_alive()  # released: the group is closed
        assert "no update group is open" in source.broadcast(iter([]), 1).error
    assert drawn == ["v_proj", "q_proj", "k_proj"]  # to the end: other ranks gather for it
    for thread in set(threading.enumerate()) - threads:
        thread.join(5)
        assert not thread.is_alive()


def test_closing_aborts_an_nccl_group() -> None:
    aborted = []

    class Group:
        def abort(self) -> None:
            aborted.append(True)

    for device, count in (("cpu", 0), ("cuda", 1)):
        source = WeightSource(device, False)
        source._group = Group()
        source.close()
        source.close()
        assert len(aborted) == count


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:2], r"expects c \(2, 2, 2\), the policy gives nothing"),
        (lambda t: [*t, ("d", torch.zeros(1))], "ends before d"),
        (lambda t: [t[1], t[0], t[2]], r"expects a \(4, 3\), the policy gives b \(5,\)"),
        (lambda t: [("a", torch.zeros(3, 4)), *t[1:]], r"expects a \(4, 3\)"),
    ],
)
def test_manifest_and_policy_must_agree(
    change: Callable[[list[tuple[str, Tensor]]], list[tuple[str, Tensor]]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        list(bucketed(change(tensors()), specs()))


def test_word_sum_sees_every_bit_and_the_order() -> None:
    generator = torch.Generator().manual_seed(1)
    data = torch.randint(0, 256, (1003,), dtype=torch.uint8, generator=generator)
    words = [int.from_bytes(bytes(data[i : i + 8].tolist()), "little") for i in range(0, 1003, 8)]
    assert word_sum(data) == sum((2 * i + 1) * w for i, w in enumerate(words)) % 2**64
    for position in (0, 500, 1002):
        flipped = data.clone()
        flipped[position] ^= 1
        assert word_sum(flipped) != word_sum(data)
    swapped = torch.cat([data[8:16], data[:8], data[16:]])
    assert word_sum(swapped) != word_sum(data)


def test_parts_of_a_stack_must_come_in_order() -> None:
    sums = ServerChecksums()
    sums.add("model.layers.0.self_attn.q_proj.weight", torch.zeros(2, 2))
    with pytest.raises(
        ValueError, match="v_proj.weight came as part 2 of .*qkv_proj.weight, out of order"
    ):
        sums.add("model.layers.0.self_attn.v_proj.weight", torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("prefix", "gate", "up", "down"),
    [
        ("model.layers.1.mlp.experts", "gate_proj", "up_proj", "down_proj"),
        ("model.layers.1.block_sparse_moe.experts", "w1", "w3", "w2"),
    ],
)
def test_experts_are_hashed_as_the_server_stacks_them(
    prefix: str, gate: str, up: str, down: str
) -> None:
    """w13 [experts, 2 x ffn, hidden] is gate, up of each expert in turn; w2 is down of each."""
    sums, parts = ServerChecksums(), torch.randn(3, 3, 4, 2)
    for expert in range(3):
        sums.add(f"{prefix}.{expert}.{gate}.weight", parts[expert, 0])
        sums.add(f"{prefix}.{expert}.{up}.weight", parts[expert, 1])
    for expert in range(3):
        sums.add(f"{prefix}.{expert}.{down}.weight", parts[expert, 2].T)
    w13 = parts[:, :2].reshape(3, 8, 2)
    w2 = parts[:, 2].transpose(1, 2)
    expected = {"w13_weight": w13, "w2_weight": w2}
    assert sums.result() == {
        f"{prefix}.{name}": hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()[:16]
        for name, t in expected.items()
    }
    with pytest.raises(ValueError, match="came as part 3 of .*w13_weight, out of order"):
        late = ServerChecksums()
        late.add(f"{prefix}.0.{gate}.weight", parts[0, 0])
        late.add(f"{prefix}.1.{up}.weight", parts[0, 0])


class FakeNccl:
    """Stands for ``dist.ProcessGroupNCCL``: records what it was made with, broadcasts to nobody."""

    class Options:
        _timeout: datetime.timedelta | None = None

    def __init__(self, store: object, rank: int, size: int, options: FakeNccl.Options) -> None:
        self.handling = os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING")
        self.rank, self.size, self.timeout = rank, size, options._timeout
        self.sent: list[Tensor] = []
        self.stuck = threading.Event()

    def broadcast(self, tensors: list[Tensor], options: dist.BroadcastOptions) -> FakeNccl:
        assert options.rootRank == 0 and not hasattr(options, "_set")
        self.sent += [t.clone() for t in tensors]
        return self

    def wait(self) -> None: ...

    def abort(self) -> None:
        self.stuck.wait()


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A device whose streams say what was asked of them; ``cuda`` tensors are CPU tensors."""
    said: list[str] = []

    class Stream:
        device = "cuda:5"

        def record_event(self) -> str:
            said.append("current stream: record")
            return "event"

        def wait_event(self, event: str) -> None:
            said.append(f"own stream: wait for {event}")

        def synchronize(self) -> None:
            said.append("own stream: synchronize")

        def __enter__(self) -> None:
            said.append("enter own stream")

        def __exit__(self, *_: object) -> None: ...

    moved = Tensor.to

    def to(tensor: Tensor, *where: object, **how: object) -> Tensor:
        return tensor if where == ("cuda",) else moved(tensor, *where, **how)  # type: ignore[call-overload]

    monkeypatch.setattr(dist, "ProcessGroupNCCL", FakeNccl, raising=False)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: said.append(f"device {device}"))
    monkeypatch.setattr(Tensor, "record_stream", lambda t, s: said.append("record_stream"))
    monkeypatch.setattr(Tensor, "to", to)
    yield said


def test_an_nccl_group_handles_no_errors_and_the_others_still_do(
    fake_gpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its watchdog would end the trainer when a server is lost."""
    for before in (None, "1"):
        if before is None:
            monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
        else:
            monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", before)
        source = WeightSource("cuda", False)
        source.open("127.0.0.1", "g", 2, 7)
        group = source._joined_group(10)
        assert group.handling == "0" and (group.rank, group.size) == (0, 2)
        assert group.timeout == datetime.timedelta(seconds=7)
        assert os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == before
        group.stuck.set()


def test_a_gpu_source_sends_on_a_stream_of_its_own(fake_gpu: list[str]) -> None:
    source, named = WeightSource("cuda", False), tensors()
    source.open("127.0.0.1", "g", 2, 20)
    report = source.broadcast(bucketed(named, specs()), 20)
    assert report.error == ""
    group = source._joined_group(1)
    assert torch.equal(group.sent[1].view(torch.float32), named[2][1].flatten())
    assert fake_gpu[0] in ("device cuda:5", "current stream: record")
    order = [line for line in fake_gpu if line.startswith(("own", "enter", "record_"))]
    assert order == 2 * [
        "enter own stream",
        "own stream: wait for event",
        "record_stream",
        "own stream: synchronize",
    ]
    started = time.monotonic()
    source.close()  # its abort hangs
    assert time.monotonic() - started < 5
    group.stuck.set()
