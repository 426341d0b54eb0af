"""The Triton kernels without a GPU: their results in Triton's interpreter, and that they compile for real devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from agpo_megatron.logprob.fused import selected_logprobs

pytestmark = pytest.mark.processes

pytest.importorskip("triton")

# Whether kernels are interpreted is decided when they are defined: a process of its own.
INTERPRETED = """
import json, sys
import torch
from agpo_megatron.logprob import passes, triton_tiles
from test_logprob_fused import WAYS, problem, run

triton_tiles.BLOCK = 64
passes.ONE_PASS_COLUMNS, passes.TWO_PASS_COLUMNS = 300, 200  # whole blocks and parts of one
worst = {}
for dtype in (torch.float32, torch.bfloat16):
    for softcap in (None, 1.5):
        for way in WAYS:
            found = []
            for kernels in ("torch", "triton"):
                inputs = problem(7, 16, 503, 512, dtype)
                arguments = {"vocab_size": 503, "temperature": 0.7, "softcap": softcap, "chunk": 4}
                got, loss = run(way, *inputs, kernels=kernels, **arguments)
                found.append([got.logprob, got.entropy, *torch.autograd.grad(loss, inputs[:2])])
            errors = [((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*found)]
            worst[f"{dtype} {softcap} {way}"] = errors
print(json.dumps(worst))
"""


def python(code: str, *arguments: str, **environment: str) -> str:
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_interpreted_kernels_equal_torch():
    worst = json.loads(python(INTERPRETED, TRITON_INTERPRET="1"))
    assert len(worst) == 12
    for case, (logprob, entropy, d_hidden, d_weight) in worst.items():
        assert logprob < 1e-6 and entropy < 1e-6, case
        rounding = 2**-6 if "bfloat16" in case else 1e-6  # a bf16 operand of the gradient's matmul
        assert d_hidden < rounding and d_weight < rounding, case


def test_triton_on_a_cpu_is_refused():
    with pytest.raises(RuntimeError, match="Triton kernels do not run on cpu"):
        selected_logprobs(
            torch.zeros(2, 8),
            torch.zeros(32, 8),
            torch.tensor([0, 29]),
            group=None,
            vocab_size=30,
            temperature=1.0,
            chunk=4,
            kernels="triton",
        )


COMPILED = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from agpo_megatron.logprob import triton_tiles as kernels

pointers = dict(y_ptr="*fp32", target_ptr="*i64")
rows = dict.fromkeys(("top_ptr", "a_ptr", "b_ptr", "at_target_ptr"), "*fp32")
statistics = pointers | dict(stats_ptr="*fp32", rows="i32", columns="i32", BLOCK="constexpr")
switches = dict(HAS_B="constexpr", HAS_BOUND="constexpr", BLOCK="constexpr")
compiled = []

def compile(kernel, signature, **constants):
    constants["BLOCK"] = kernels.BLOCK
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    done = triton.compile(source, target=target, options={"num_warps": kernels.WARPS})
    compiled.append({"ptx": done.asm["ptx"], "cubin": len(done.asm["cubin"])})

compile(kernels.statistics_kernel, statistics)
for out in ("*bf16", "*fp32"):
    signature = pointers | dict(d_ptr=out) | rows | dict(columns="i32", bound="fp32") | switches
    order = ["y_ptr", "d_ptr", "target_ptr", *rows, "columns", "bound", *switches]
    for has_b in (False, True):
        for has_bound in (False, True):
            compile(
                kernels.gradient_kernel,
                {name: signature[name] for name in order},
                HAS_B=has_b,
                HAS_BOUND=has_bound,
            )
print(json.dumps(compiled))
"""


@pytest.mark.full
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile(capability, tmp_path):
    """To PTX and machine code, offline: that they lower, not that they run."""
    out = python(
        COMPILED,
        str(capability),
        TRITON_CACHE_DIR=str(tmp_path),
        TRITON_DEFAULT_FP_FUSION="1",
        TRITON_INTERPRET="0",
    )
    compiled = json.loads(out)
    assert len(compiled) == 9
    for kernel in compiled:
        assert f".target sm_{capability}" in kernel["ptx"]
        assert "ex2.approx" in kernel["ptx"] and kernel["cubin"] > 1000
