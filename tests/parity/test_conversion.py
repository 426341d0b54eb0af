"""Every architecture in every layout: Hugging Face -> Megatron -> back bit by bit; logits are those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import conversion_cases as cases
import converter
import pytest
import tiny_models
import torch
from ranks import Ranks
from torch import Tensor

from agpo_megatron.config.schema import PolicyConfig
from agpo_megatron.conversion.hf_checkpoint import HfCheckpoint

BATCH = tiny_models.sequences([5, 30, 17, 1, 9, 22, 2, 16], vocab=131)
LOGITS = 1e-5


def convert(*command: object) -> None:
    assert converter.convert(*command) == 0


class Models:
    """Each architecture as transformers saved it and as it converts, made when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.reference: dict[str, Any] = {}

    def folders(self, name: str, dtype: str) -> tuple[Path, Path]:
        """(Hugging Face folder, Megatron folder)."""
        fp32, hf, megatron = (self.root / f"{name}-{x}" for x in ("fp32", dtype, f"{dtype}-m"))
        if name not in self.reference:
            self.reference[name] = cases.hf_model(name)
            self.reference[name].save_pretrained(fp32)
        if not megatron.exists():
            convert("to-megatron", fp32, megatron, "--dtype", dtype, "--tp", 2)
        if not hf.exists():
            convert("to-hf", megatron, hf)
        return hf, megatron


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("conversion"))


@pytest.fixture(scope="module")
def pools() -> Any:
    made: dict[int, Ranks] = {}

    def pool(world: int) -> Ranks:
        if world not in made or not made[world].alive:
            made[world] = Ranks(world)
        return made[world]

    yield pool
    for ranks in made.values():
        ranks.close()


def run(pools: Any, models: Models, names: list[str], policy: PolicyConfig) -> None:
    """``names`` in one layout."""
    layout = "-".join(str(v) for v in policy.model_dump().values() if isinstance(v, int | str))
    saved = {name: models.root / f"{name}-{layout}" for name in names}
    folders = {
        name: cases.Model(*map(str, (*models.folders(name, policy.dtype), saved[name])))
        for name in names
    }
    ranks = pools(policy.world_size).run(cases.execute, folders, policy, BATCH, timeout=600)
    for name in names:
        source = HfCheckpoint(folders[name].hf_dir)
        found = cases.merged(ranks, name)
        assert_same(found.from_hf, source, f"{name} after loading Hugging Face weights")
        assert_same(found.from_megatron, source, f"{name} after loading the converted checkpoint")
        back = models.root / f"{saved[name].name}-back"
        convert("to-hf", saved[name], back, "--like", source.folder)
        returned = HfCheckpoint(back)
        assert_same({n: returned.load(n) for n in returned.specs}, source, f"{name} saved")
        if policy.dtype == "fp32":
            assert_logits(models.reference[name], found, name, policy.data_parallel)


def layout(world: int, dtype: str, tp: int, pp: int, ep: int = 1) -> PolicyConfig:
    """Filled up to ``world`` ranks by DP."""
    return PolicyConfig(
        tensor_parallel=tp,
        pipeline_parallel=pp,
        expert_parallel=ep,
        data_parallel=world // (tp * pp),
        sequence_parallel=tp > 1,
        dtype=dtype,  # type: ignore[arg-type]
    )


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
            table = model(torch.tensor([s.tokens])).logits[0]
        if found.logits:
            assert (found.logits[i] - table).abs().max() < LOGITS, (name, s.sample_id)
        table = table.double().log_softmax(-1)
        expected = [0.0, *(table[t - 1, s.tokens[t]].item() for t in range(1, len(s.tokens)))]
        assert found.logprobs[s.sample_id] == pytest.approx(expected, abs=LOGITS), (
            name,
            s.sample_id,
        )


EVERY = list(cases.CONFIGS)
MIXTURES = [name for name in EVERY if name.startswith(cases.EXPERTS)]
LAYOUTS = [
    *[(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (2, 2, 1), (1, 4, 1)],
    *[(1, 1, 2), (1, 1, 4), (2, 1, 2), (1, 2, 2)],
]
"""TP, PP, EP of four ranks; DP fills up."""


@pytest.mark.parametrize(
    ("names", "tp", "ep"), [(EVERY, 2, 1), (MIXTURES, 1, 2)], ids=["tp2", "ep2"]
)
def test_two_ranks(pools: Any, models: Models, names: list[str], tp: int, ep: int) -> None:
    run(pools, models, names, layout(2, "fp32", tp, 1, ep))


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("tp", "pp", "ep"), LAYOUTS)
def test_every_layout_of_four_ranks(
    pools: Any, models: Models, dtype: str, tp: int, pp: int, ep: int
) -> None:
    run(pools, models, EVERY if ep == 1 else MIXTURES, layout(4, dtype, tp, pp, ep))


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_one_replica_of_each_number_of_stages(pools: Any, models: Models, pp: int) -> None:
    """Without data parallelism the logits of one rank, and pipelines, stand alone."""
    run(pools, models, EVERY, layout(pp, "fp32", 1, pp))
