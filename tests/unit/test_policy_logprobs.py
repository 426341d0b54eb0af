"""The packed Megatron policy and transformers agree on the same checkpoint."""

from __future__ import annotations

from pathlib import Path

import policy_models
import pytest
import torch
from made import loss

from agpo_megatron.config.schema import PolicyConfig

pytestmark = pytest.mark.processes

LENGTHS = [5, 60, 17, 1, 9, 33, 2, 16]


@pytest.mark.parametrize("kind", ["llama", "tied", "llama3", "qwen2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_equal_transformers(kind: str, temperature: float, tmp_path: Path) -> None:
    model = policy_models.hf_model(kind)
    folder = policy_models.save(model, tmp_path / "hf")
    batch = policy_models.sequences(LENGTHS)
    with policy_models.one_rank(folder, temperature=temperature) as policy:
        scores = policy.score([batch[:5], batch[5:]])
    assert scores.keys() == {s.sample_id for s in batch}
    for s in batch:
        with torch.no_grad():
            table = model(torch.tensor(s.tokens)[None]).logits[0, :-1].double() / temperature
        table = table.log_softmax(-1)
        expected = [0.0] + [table[t - 1, s.tokens[t]].item() for t in range(1, len(s.tokens))]
        assert scores[s.sample_id].logprobs == pytest.approx(expected, abs=1e-5)
        if len(s.tokens) > 1:
            entropy = -(table.exp() * table).sum(-1).mean().item()
            assert scores[s.sample_id].entropy == pytest.approx(entropy, abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "tied", "qwen2"])
def test_weights_come_back_as_they_went_in(kind: str, tmp_path: Path) -> None:
    """Every Hugging Face tensor once, bit by bit, a tied head not at all."""
    model = policy_models.hf_model(kind)
    folder = policy_models.save(model, tmp_path / "hf")
    with policy_models.one_rank(folder) as policy:
        found = {name: tensor.clone() for name, tensor in policy.named_hf_tensors()}
    expected = {n: p for n, p in model.state_dict().items() if n != "lm_head.weight"}
    if kind == "llama":
        expected["lm_head.weight"] = model.lm_head.weight
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_the_optimizers_own_copy_is_the_checkpoints(tmp_path: Path) -> None:
    """In bf16 the optimizer holds its own fp32 weights: a load that forgets them is undone by the next step."""
    model = policy_models.hf_model("llama")
    folder = policy_models.save(model, tmp_path / "hf")
    batch = policy_models.sequences([12, 8])
    with policy_models.one_rank(folder, PolicyConfig(dtype="bf16")) as policy:
        policy.update([batch], loss=loss(policy="nll"), lr=1e-8)
        found = {name: tensor.clone() for name, tensor in policy.named_hf_tensors()}
    for name, expected in model.state_dict().items():
        assert torch.allclose(found[name].float(), expected, rtol=1e-2, atol=1e-4), name


def test_bf16_stays_near_fp32(tmp_path: Path) -> None:
    folder = policy_models.save(policy_models.hf_model("llama"), tmp_path / "hf")
    batch = policy_models.sequences([30, 12])
    results = []
    for dtype in ("fp32", "bf16"):
        with policy_models.one_rank(folder, PolicyConfig(dtype=dtype)) as policy:
            results.append(policy.update([batch], loss=loss(policy="nll"), lr=1e-4))
    assert results[1]["loss/policy"] == pytest.approx(results[0]["loss/policy"], rel=2e-2)
    assert results[1]["grad_norm"] == pytest.approx(results[0]["grad_norm"], rel=5e-2)
