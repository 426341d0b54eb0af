"""The device backend: the same Megatron-Core on CUDA/NCCL and, where there is no accelerator, on CPU/gloo.

``activate()`` runs once per process, before the first import of megatron. On CUDA it only reports what is there and
fixes one device-independent bug. On the CPU it lets the *unmodified* megatron-core run, by three means:

1. import guards: modules that megatron-core imports unconditionally but that a CPU machine may lack (triton), and GPU
   libraries that it prefers wherever they can be imported (Transformer Engine, apex);
2. ``torch.cuda`` functions that mean "the current accelerator" answer for the CPU;
3. inside ``Backend.scope()`` a ``TorchFunctionMode`` maps ``device="cuda"``, ``.cuda()``, pinned memory and the string
   ``'torch.cuda.FloatTensor'`` to their CPU counterparts.

The places this answers for are file-level facts of one release, so the release is pinned exactly.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.overrides import TorchFunctionMode

MEGATRON_VERSION = "0.19.2"
CPU = torch.device("cpu")


class BackendError(RuntimeError):
    """The engine or the device asked for is not there, or ``activate`` was called too late."""


@dataclass(frozen=True)
class Backend:
    """``device_type``: what tensors live on; ``dist_backend``: what moves them between ranks."""

    device_type: Literal["cpu", "cuda"]
    dist_backend: Literal["gloo", "nccl"]
    device: torch.device
    transformer_engine: bool

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Everything that runs megatron runs inside; re-entrant, per thread, a no-op on CUDA."""
        if self.device_type == "cuda" or getattr(_scoped, "active", False):
            yield
            return
        _scoped.active = True
        try:
            with _CudaMeansCpu():
                yield
        finally:
            _scoped.active = False


_scoped = threading.local()
_active: Backend | None = None


def activate(
    device: Literal["auto", "cpu", "cuda"] = "auto", layers: Literal["auto", "local"] = "auto"
) -> Backend:
    """Prepare this process for megatron-core on ``device`` and say what it runs on. Idempotent.

    ``layers``: "auto" takes Transformer Engine's on CUDA, "local" megatron-core's own on every device, and torch's
    optimizer with them. Raises BackendError: wrong megatron-core version, no CUDA device where one is asked for, no
    Transformer Engine that can be imported where it is to be used, megatron imported already, or a second call for
    another device.
    """
    global _active
    _check_version()
    kind = _choose(device)
    if _active is not None:
        if kind != _active.device_type:
            raise BackendError(
                f"this process already runs on {_active.device_type}, it cannot change to {kind}"
            )
        return _active
    if kind == "cuda":
        index = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(index)
        if layers == "local":
            _refuse_early_megatron()
            _hide_gpu_libraries()
        else:
            _require_transformer_engine()
        _active = Backend("cuda", "nccl", torch.device("cuda", index), layers == "auto")
    else:
        _refuse_early_megatron()
        _hide_gpu_libraries()
        _guard_imports()
        _answer_for_torch_cuda()
        _active = Backend("cpu", "gloo", CPU, False)
        with _active.scope(), _eager_fusers():
            _patch_rng()
            _patch_token_dispatcher()
            _patch_uneven_collectives()
    with _active.scope():
        _patch_torch_adamw_checkpoint()
    return _active


def current() -> Backend:
    """The backend of this process. Raises BackendError before ``activate``."""
    if _active is None:
        raise BackendError("policy.backend.activate() has not been called in this process")
    return _active


def _check_version() -> None:
    try:
        found = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError as error:
        raise BackendError(
            f"megatron-core is not installed; install megatron-core=={MEGATRON_VERSION} "
            "(launch/install.sh does it)"
        ) from error
    if found != MEGATRON_VERSION:
        raise BackendError(
            f"megatron-core {found} is installed, but this release is written against "
            f"{MEGATRON_VERSION}; install megatron-core=={MEGATRON_VERSION}"
        )


def _choose(device: str) -> Literal["cpu", "cuda"]:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise BackendError(
                "cluster.device is cuda, but torch sees no CUDA device; use cpu or auto, or install "
                "a CUDA build of torch"
            )
        return "cuda"
    return "cpu"


def _refuse_early_megatron() -> None:
    if "megatron.core" in sys.modules:
        raise BackendError("activate() must run before the first import of megatron.core")


def _require_transformer_engine() -> None:
    """Transformer Engine can be absent (ImportError) or broken (missing library, wrong torch). megatron-core would go
    on without it, with slower layers, another optimizer and no FP8, and say nothing that anyone reads."""
    try:
        import transformer_engine.pytorch  # type: ignore[import-not-found]  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        raise BackendError(
            f"Transformer Engine cannot be imported ({type(error).__name__}: {error}); install the trainers' "
            "environment again (launch/install.sh --gpu, launch/images/) or set policy.layers to local (slower, no FP8)"
        ) from error


# ---------------------------------------------------------------- 1. import guards


def _hide_gpu_libraries() -> None:
    """core/optimizer picks Transformer Engine's or apex's fused Adam, norms and scaling at import, wherever they can be
    imported, and would hand them CPU tensors. An import of a name that ``sys.modules`` maps to None is an ImportError,
    which megatron-core answers with plain torch. Modules imported before (a check of the configuration looks for
    Transformer Engine) are hidden as well."""
    hidden = ("transformer_engine", "apex")
    for name in {*hidden, *(n for n in sys.modules if n.split(".")[0] in hidden)}:
        sys.modules[name] = None  # type: ignore[assignment]


def _guard_imports() -> None:
    """core/transformer/moe/ops/paged_stash.py imports triton unconditionally; nothing on this path calls it."""
    if importlib.util.find_spec("triton") is not None:
        return

    def missing(*_: Any, **__: Any) -> None:
        raise BackendError("the MoE paged stash needs triton and a GPU")

    class Kernel:
        __call__ = missing
        __getitem__ = missing

    name = "megatron.core.transformer.moe.ops.paged_stash"
    module = types.ModuleType(name)
    module.GLOBAL_BLOCK_SIZE = 1024  # type: ignore[attr-defined]
    module.paged_stash_copy_kernel = Kernel()  # type: ignore[attr-defined]
    module.paged_stash_pop_kernel = Kernel()  # type: ignore[attr-defined]
    sys.modules[name] = module


@contextlib.contextmanager
def _eager_fusers() -> Iterator[None]:
    """core/jit.py binds ``jit_fuser = torch.compile`` when it is first imported. Compiling C++ for a CPU run costs
    minutes, and importing the compiler alone seconds, so what it sees is a decorator that does nothing."""
    original = torch.compile
    torch.compile = lambda model=None, **_: model if model is not None else lambda f: f  # type: ignore[assignment]
    try:
        import megatron.core.jit  # noqa: F401

        yield
    finally:
        torch.compile = original


# ---------------------------------------------------------------- 2. torch.cuda


class _Stream:
    """Stands for ``torch.cuda.Stream`` and ``Event``: CPU operators are synchronous, every method is done at once."""

    cuda_stream = stream_id = device_index = device_type = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., _Stream]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: self  # record_event() must hand back an event

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _end: _Stream) -> float:
        return 0.0


def _answer_for_torch_cuda() -> None:
    cuda = torch.cuda
    stream = _Stream()

    # Each name gets a function of its own: torch's compiler, should anything import it, keeps a rule per function.
    def answer(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    def seed() -> Callable[[int], None]:
        return lambda value: (torch.default_generator.manual_seed(int(value)), None)[1]

    answers: dict[str, Any] = {
        # megatron only ever writes device=torch.cuda.current_device()
        "current_device": answer(CPU),
        "current_stream": answer(stream),
        "default_stream": answer(stream),
        "Stream": _Stream,
        "Event": type("_Event", (_Stream,), {}),
        "stream": lambda *_, **__: contextlib.nullcontext(),
        "device": lambda *_, **__: contextlib.nullcontext(),
        "is_current_stream_capturing": answer(False),
        "get_device_capability": answer((0, 0)),
        # the CPU's default generator is "the accelerator's generator"
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "manual_seed": seed(),
        "manual_seed_all": seed(),
        "default_generators": (torch.default_generator,),
    }
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        answers[name] = answer(None)
    for name in ("allocated", "reserved"):
        answers[f"memory_{name}"] = answer(0)
        answers[f"max_memory_{name}"] = answer(0)
    for name, value in answers.items():
        setattr(cuda, name, value)
    cuda.random.get_rng_state = cuda.get_rng_state
    cuda.random.set_rng_state = cuda.set_rng_state
    cuda.nvtx.range_push = answer(0)
    cuda.nvtx.range_pop = answer(0)


# ---------------------------------------------------------------- 3. the function mode


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


_NO_OPS = frozenset({torch.Tensor.cuda, torch.Tensor.pin_memory})
_TYPE = torch.Tensor.type
_TO = torch.Tensor.to


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites a CUDA device to the CPU in every overridable torch function. Thread-local, as all such modes."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _NO_OPS:
            return args[0]
        if func is _TYPE and len(args) == 1 and not kwargs:
            # DistributedOptimizer and clip_grads compare with the literal 'torch.cuda.FloatTensor'
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is _TO and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        if not kwargs:
            return func(*args)
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": CPU}
        return func(*args, **kwargs)


# ---------------------------------------------------------------- named patches of megatron-core


def _patch_rng() -> None:
    """core/tensor_parallel/random.py bound CUDA's lazy call at import, and its ``fork`` warns when the CPU generator
    moves inside: here that is the one generator there is."""
    from megatron.core.tensor_parallel import random as mcore

    def set_state(state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    def get_state(
        device: Any = "cuda", clone: bool = False, graph_safe: bool = False
    ) -> torch.Tensor:
        return torch.get_rng_state()

    @contextlib.contextmanager
    def fork(self: Any, name: str = mcore._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        if name not in self.states_:
            raise BackendError(f"random state {name!r} was never added to megatron's tracker")
        outer, outer_name = torch.get_rng_state(), self._current_state_name
        torch.set_rng_state(self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer)
            self._current_state_name = outer_name

    mcore._set_cuda_rng_state = set_state
    mcore._get_cuda_rng_state = get_state
    mcore._lazy_call = lambda call, **_: call()
    mcore.CudaRNGStatesTracker.fork = fork


def _patch_token_dispatcher() -> None:
    """core/transformer/moe/moe_utils.py turns split sizes into integers only when they are on CUDA;
    ``all_to_all_single`` needs integers on every device."""
    from megatron.core.transformer.moe import token_dispatcher as mcore

    original = mcore.maybe_move_tensor_to_cpu

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor) and tensor.device.type == "cpu":
            return tensor.numpy()
        return original(tensor, as_numpy, False)

    mcore.maybe_move_tensor_to_cpu = to_host


def _patch_uneven_collectives() -> None:
    """core/tensor_parallel/mappings.py gathers and reduce-scatters parts of different length over the TP ranks of an
    expert; gloo wants equal ones: parts are padded to the longest, sums are made whole before they are cut."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel import mappings as mcore

    gather, reduce_scatter = mcore._gather_along_first_dim, mcore._reduce_scatter_along_first_dim

    def gather_uneven(
        x: torch.Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False
    ) -> Any:
        if sizes is None or group.size() == 1:
            return gather(x, group, sizes, use_global_buffer)
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: x.shape[0]] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])

    def reduce_scatter_uneven(
        x: torch.Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False
    ) -> Any:
        if sizes is None or group.size() == 1:
            return reduce_scatter(x, group, sizes, use_global_buffer)
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total.split(sizes)[group.rank()].clone()

    mcore._gather_along_first_dim = gather_uneven
    mcore._reduce_scatter_along_first_dim = reduce_scatter_uneven


def _patch_torch_adamw_checkpoint() -> None:
    """Without TE and apex, DistributedOptimizer wraps ``torch.optim.AdamW``, whose state has a ``step`` per parameter.
    Three bugs of core/optimizer/distrib_optimizer.py follow, on every device:

    - ``state_dict()`` asserts that a step exists, so a fresh optimizer cannot describe itself (:839);
    - ``_set_main_param_and_optimizer_states()`` looks ``step`` up among the resharded tensors: KeyError (:1223);
    - ``load_state_dict()`` gives every parameter the *same* step tensor (:1030), which AdamW then increments once per
      parameter: the resumed run drifts silently.
    """
    from megatron.core.optimizer import distrib_optimizer as mcore

    if mcore.HAVE_APEX_OR_TE:
        return
    cls = mcore.DistributedOptimizer
    state_dict, load, set_states = (
        cls.state_dict,
        cls.load_state_dict,
        cls._set_main_param_and_optimizer_states,
    )

    def describe(self: Any) -> Any:
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if not self.optimizer.state.get(param):
                    self.optimizer.state[param].update(
                        step=torch.tensor(0.0),
                        exp_avg=torch.zeros_like(param),
                        exp_avg_sq=torch.zeros_like(param),
                    )
        return state_dict(self)

    def restore(self: Any, saved: Any) -> None:
        load(self, saved)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].detach().clone()

    def set_param(self: Any, param: Any, tensors: dict[str, Any]) -> None:
        # a non-tensor is skipped there; the step is restored by load_state_dict
        tensors.setdefault("step", None)
        set_states(self, param, tensors)

    cls.state_dict = describe
    cls.load_state_dict = restore
    cls._set_main_param_and_optimizer_states = set_param
