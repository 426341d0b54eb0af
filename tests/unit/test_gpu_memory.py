"""The memory formula against Megatron's own modules, built for ranks of the real layouts, and the figures in the
configurations against the formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_ranks import simulated_rank
from test_gpu_fp8_shapes import SHAPES

from agpo_megatron.config import check_config, load_config
from agpo_megatron.config.schema import Fp8Config, PolicyConfig
from agpo_megatron.conversion.shape import ModelShape
from agpo_megatron.parity.models import MIXTRAL, QWEN3_MOE
from agpo_megatron.policy import backend
from agpo_megatron.policy.memory import layer_activations, rank_memory, stage_parameters

pytestmark = pytest.mark.processes

CONFIGS = Path(__file__).parents[2] / "configs"


def built(shape: ModelShape, policy: PolicyConfig, rank: int) -> tuple[int, int, int]:
    """Pipeline stage of ``rank``, and the parameters of its GPTModel: its own, its experts'. The memory is asked for
    and never written to."""
    from agpo_megatron.policy.model import build_chunks, transformer_config

    policy = policy.model_copy(update={"fp8": Fp8Config()})
    with simulated_rank(policy, rank) as layout, backend.current().scope():
        chunks = build_chunks(shape, transformer_config(shape, policy), layout)
        named = [item for chunk in chunks for item in chunk.named_parameters()]
    experts = sum(p.numel() for name, p in named if ".experts." in name)
    return layout.pp_rank, sum(p.numel() for _, p in named) - experts, experts


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_of_a_rank_of_every_stage(name: str) -> None:
    shape, policy = ModelShape.from_hf(SHAPES[name]), load_config(CONFIGS / name).policy
    for stage in range(policy.pipeline_parallel):
        rank = stage * policy.world_size // policy.pipeline_parallel
        found = built(shape, policy, rank)
        assert found == (stage, *stage_parameters(shape, policy, stage))


@pytest.mark.parametrize("model", [MIXTRAL, QWEN3_MOE])
def test_parameters_of_experts(model: dict[str, Any]) -> None:
    shape = ModelShape.from_hf(model)
    policy = PolicyConfig(
        tensor_parallel=2, sequence_parallel=True, expert_parallel=2, data_parallel=2
    )
    assert built(shape, policy, 1) == (0, *stage_parameters(shape, policy, 0))
    assert stage_parameters(shape, policy, 0)[1] > 0


@pytest.mark.parametrize("name", SHAPES)
def test_the_configuration_quotes_the_formula(name: str) -> None:
    config = load_config(CONFIGS / name)
    memory = rank_memory(
        ModelShape.from_hf(SHAPES[name]), config.policy, config.train.micro_batch_tokens
    )
    assert f"#   {memory}\n" in (CONFIGS / name).read_text()
    assert memory.total < 0.75 * 80e9, "leave room for NCCL's buffers and the allocator's pieces"


@pytest.mark.parametrize("name", SHAPES)
def test_servers_have_room_beside_weights_and_cache(name: str) -> None:
    """SGLang's own heuristic keeps 14.8 GB free on such a GPU; a bucket of weights is one tensor at least."""
    config = load_config(CONFIGS / name)
    free = (1 - config.rollout.server_args["mem_fraction_static"]) * 80e9
    embedding = 2 * SHAPES[name]["vocab_size"] * SHAPES[name]["hidden_size"]
    assert free >= 14.8e9 and embedding < free / 4
    assert config.algorithm.loss.correction.kind == "tis"
    assert not any("correction" in warning for warning in check_config(config))


def test_terms_of_the_formula() -> None:
    shape = ModelShape.from_hf(SHAPES["agpo_70b.yaml"])
    policy = load_config(CONFIGS / "agpo_70b.yaml").policy
    memory = rank_memory(shape, policy, 18432)
    parameters = stage_parameters(shape, policy, 0)[0]
    assert memory.weights == 2 * parameters and memory.gradients == 4 * parameters
    assert memory.optimizer == 12 * parameters // policy.data_parallel
    plain = policy.model_copy(update={"distributed_optimizer": False, "fp8": Fp8Config()})
    assert rank_memory(shape, plain, 18432).optimizer == 12 * parameters
    assert rank_memory(shape, plain, 18432).fp8 == 0
    assert rank_memory(shape, policy, 2 * 18432).activations == 2 * memory.activations


def test_activations_are_those_that_autograd_keeps() -> None:
    """Of one layer, on one rank, in fp32: what saved tensors hold, without the weights, counted as it runs. The local
    layers keep some tensors that Transformer Engine's do not (both sides of a cast, the rotary angles), none less."""
    import policy_models
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {**policy_models.SMALL, "num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 32}
    sizes |= {"intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    shape = ModelShape.from_hf(model.config.to_dict())
    storages: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.numel() >= 512:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    kept = []
    layer = model.model.layers[0]
    tokens = 512
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(keep(t)) or t, lambda t: t):
        x = torch.randn(1, tokens, 64, requires_grad=True)
        position = model.model.rotary_emb(x, torch.arange(tokens)[None])
        layer(x, position_embeddings=position)
    whole, entry = layer_activations(shape, PolicyConfig(dtype="fp32"))
    found = sum(storages.values()) / tokens
    assert entry == 4 * 64
    assert whole <= found <= 2.5 * whole
