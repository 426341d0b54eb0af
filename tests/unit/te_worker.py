"""A tiny policy with the layers of a GPU run, from the stub of Transformer Engine, in its own process (megatron-core
chooses at import): ``te_worker.py FOLDER {te,local} WHAT,...``. Prints JSON by WHAT."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agpo_megatron.policy import backend


def activate(layers: str) -> None:
    """As on a CPU, but for ``te`` with Transformer Engine in view, and said to be in use."""
    if layers == "te":
        sys.path.insert(0, str(Path(__file__).parent / "te_stub"))
        backend._hide_gpu_libraries = lambda: None
        made = backend.activate("cpu")
        backend._active = dataclasses.replace(made, transformer_engine=True)


def updates(folder: Path) -> dict[str, Any]:
    """Losses of three steps and log-probs after them; what the layers were given."""
    import policy_models

    from agpo_megatron.algorithm.settings import LossSettings

    batch = policy_models.sequences([20, 9, 14, 2])
    with policy_models.one_rank(folder) as policy:
        losses = [
            policy.update([batch], loss=LossSettings(policy="nll"), lr=1e-3)["loss/policy"]
            for _ in range(3)
        ]
        scores = policy.score([batch])
        return {
            "losses": losses,
            "logprobs": [float(x) for name in sorted(scores) for x in scores[name].logprobs],
            "layer": type(policy.chunks[0].module.decoder.layers[0].mlp.linear_fc1).__name__,
            "optimizer": type(policy.optimizer.chained_optimizers[0].optimizer).__name__,
        }


def resumed(folder: Path) -> dict[str, Any]:
    """A checkpoint before the first step, one after it, and how training goes on from each."""
    import policy_models

    from agpo_megatron.algorithm.settings import LossSettings
    from agpo_megatron.policy import checkpoint

    batch = policy_models.sequences([20, 9, 14])

    def step(policy: Any) -> float:
        return float(
            policy.update([batch], loss=LossSettings(policy="nll"), lr=1e-3)["loss/policy"]
        )

    with tempfile.TemporaryDirectory() as where, policy_models.one_rank(folder) as policy:
        checkpoint.save(Path(where) / "0", policy, 0, {})
        expected = [step(policy)]
        checkpoint.save(Path(where) / "1", policy, 1, {})
        expected += [step(policy), step(policy)]
        checkpoint.load(Path(where) / "0", policy)
        from_zero = [step(policy), step(policy), step(policy)]
        checkpoint.load(Path(where) / "1", policy)
        from_one = [step(policy), step(policy)]
    return {"expected": expected, "from_zero": from_zero, "from_one": from_one}


def write(folder: Path) -> dict[str, Any]:
    """A checkpoint after one step, in ``folder``/LAYERS, and log-probs under its weights."""
    import policy_models

    from agpo_megatron.algorithm.settings import LossSettings
    from agpo_megatron.policy import checkpoint

    batch = policy_models.sequences([20, 9, 14])
    with policy_models.one_rank(folder) as policy:
        policy.update([batch], loss=LossSettings(policy="nll"), lr=1e-2)
        checkpoint.save(folder / sys.argv[2], policy, 1, {})
        return {"logprobs": policy.score([batch])["s0"].logprobs.tolist()}


def read(folder: Path) -> dict[str, Any]:
    """Log-probs under the weights of the checkpoint that the other kind of layers has written."""
    import policy_models

    from agpo_megatron.policy import checkpoint

    other = {"te": "local", "local": "te"}[sys.argv[2]]
    with policy_models.one_rank(folder) as policy:
        checkpoint.load_weights(folder / other, policy.chunks, policy.layout)
        batch = policy_models.sequences([20, 9, 14])
        return {"logprobs": policy.score([batch])["s0"].logprobs.tolist()}


def calls(folder: Path) -> dict[str, Any]:
    """Arguments of every layer, as text, and the rows of every matmul with packs for an FP8 recipe."""
    import policy_models
    import transformer_engine.pytorch as te  # type: ignore[import-not-found]

    from agpo_megatron.algorithm.settings import LossSettings
    from agpo_megatron.config.schema import Fp8Config, PolicyConfig
    from agpo_megatron.policy import model, policy

    model._fp8 = lambda *_: {}  # the stub multiplies in fp32; the packs are those of FP8
    found = {}
    for recipe in ("tensorwise", "blockwise", "mxfp8"):
        config = PolicyConfig(dtype="fp32", fp8=Fp8Config(recipe=recipe))
        te.FP8_ROWS.clear()
        with policy_models.one_rank(folder, config) as built:
            built.update(
                [policy_models.sequences([9, 5])], loss=LossSettings(policy="nll"), lr=1e-3
            )
            built.score([policy_models.sequences([32])])
            filler = policy.pack_all([], policy.pack_multiple(config), 1, same_length=False)
        found[recipe] = sorted({*te.FP8_ROWS, len(filler[0].tokens)})
    made = [(name, {k: str(v) for k, v in given.items()}) for name, given in te.CALLS]
    return {"rows": found, "layers": made}


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    folder, layers, what = sys.argv[1:]
    activate(layers)
    work: dict[str, Callable[[Path], dict[str, Any]]] = {
        "updates": updates,
        "resumed": resumed,
        "write": write,
        "read": read,
        "calls": calls,
    }
    found = {name: work[name](Path(folder)) for name in what.split(",")}
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
