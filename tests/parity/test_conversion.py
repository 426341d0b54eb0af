"""Every architecture in every layout: Hugging Face -> Megatron -> back bit by bit; logits are those of transformers."""

from __future__ import annotations

from typing import Any

import conversion_cases as cases
import converter
import pytest
import torch
from torch import Tensor

from agpo_megatron.config.schema import PolicyConfig
from agpo_megatron.conversion.hf_checkpoint import HfCheckpoint
from agpo_megatron.parity.batch import recorded, train_sequences
from agpo_megatron.parity.contract import Contract

BATCH = train_sequences(recorded((5, 30, 17, 1, 9, 22, 2, 16), vocab=131), "token_mean", 1)
LOGITS = 1e-5


def convert(*command: object) -> None:
    assert converter.convert(*command) == 0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of each architecture: the transformers model, its folders in both precisions, and what they convert to."""
    root = tmp_path_factory.mktemp("conversion")
    made = {}
    for name in cases.CONFIGS:
        model = cases.hf_model(name)
        made[name] = model
        model.save_pretrained(root / f"{name}-fp32")
        convert("to-megatron", root / f"{name}-fp32", root / f"{name}-fp32-m", "--tp", 2)
        convert("to-megatron", root / f"{name}-fp32", root / f"{name}-bf16-m", "--dtype", "bf16")
        convert("to-hf", root / f"{name}-bf16-m", root / f"{name}-bf16")
    return {"root": root, "models": made}


def run(
    contract: Contract,
    models: dict[str, Any],
    names: list[str],
    world: int,
    dtype: str,
    tp: int,
    pp: int,
    ep: int,
) -> None:
    """``names`` in one layout, which DP fills up to ``world`` ranks."""
    root = models["root"]
    policy = PolicyConfig(
        tensor_parallel=tp,
        pipeline_parallel=pp,
        expert_parallel=ep,
        data_parallel=world // (tp * pp),
        sequence_parallel=tp > 1,
        dtype=dtype,  # type: ignore[arg-type]
    )
    saved = {name: root / f"{name}-{dtype}-{world}-{tp}-{pp}-{ep}" for name in names}
    folders = {
        name: cases.Model(
            str(root / f"{name}-{dtype}"), str(root / f"{name}-{dtype}-m"), str(saved[name])
        )
        for name in names
    }
    ranks = contract.ranks(world).run(world, cases.execute, folders, policy, BATCH)
    for name in names:
        source = HfCheckpoint(folders[name].hf_dir)
        found = cases.merged(ranks, name)
        assert_same(found.from_hf, source, f"{name} after loading Hugging Face weights")
        assert_same(found.from_megatron, source, f"{name} after Megatron loaded the converted one")
        assert_same(found.from_stored, source, f"{name} after loading the converted checkpoint")
        back = saved[name].with_suffix(".hf")
        convert("to-hf", saved[name], back, "--like", source.folder)
        returned = HfCheckpoint(back)
        assert_same({n: returned.load(n) for n in returned.specs}, source, f"{name} saved")
        if dtype == "fp32":
            assert_logits(models["models"][name], found, name, policy.data_parallel)


def assert_same(found: dict[str, Tensor], source: HfCheckpoint, what: str) -> None:
    names = source.weight_map().hf_shapes()
    assert found.keys() == names.keys(), what
    for name in names:
        expected = source.load(name)
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected), f"{what}: {name}"


def assert_logits(model: Any, found: cases.Found, name: str, replicas: int) -> None:
    """Packed log-probs, and where the layout has them whole the logits, of every sequence alone."""
    order = [s for replica in range(replicas) for s in BATCH[replica::replicas]]
    for i, s in enumerate(order):
        with torch.no_grad():
            table = model(torch.tensor(s.tokens)[None]).logits[0]
        if found.logits:
            assert (found.logits[i] - table).abs().max() < LOGITS, (name, s.sample_id)
        table = table.double().log_softmax(-1)
        expected = [0.0, *(table[t - 1, s.tokens[t]].item() for t in range(1, s.length))]
        assert found.logprobs[s.sample_id] == pytest.approx(expected, abs=LOGITS), (
            name,
            s.sample_id,
        )


EVERY = list(cases.CONFIGS)
MIXTURES = [name for name in EVERY if name.startswith(cases.EXPERTS)]


@pytest.mark.parametrize(
    ("names", "tp", "pp", "ep"), [(EVERY, 2, 1, 1), (MIXTURES, 1, 1, 2)], ids=["tp2", "ep2"]
)
def test_two_ranks(
    contract: Contract, models: Any, names: list[str], tp: int, pp: int, ep: int
) -> None:
    run(contract, models, names, 2, "fp32", tp, pp, ep)


DENSE_LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)]
EXPERT_LAYOUTS = [(1, 1, 2), (1, 1, 4), (2, 1, 2), (1, 2, 2)]


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("tp", "pp"), DENSE_LAYOUTS)
def test_every_layout_of_four_ranks(
    contract: Contract, models: Any, dtype: str, tp: int, pp: int
) -> None:
    run(contract, models, EVERY, 4, dtype, tp, pp, 1)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("tp", "pp", "ep"), EXPERT_LAYOUTS)
def test_every_layout_with_experts_dealt_out(
    contract: Contract, models: Any, dtype: str, tp: int, pp: int, ep: int
) -> None:
    run(contract, models, MIXTURES, 4, dtype, tp, pp, ep)
