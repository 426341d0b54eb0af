"""The trainer's answer to a score command: real policy, real journal."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import policy_models
import pytest
from test_journal import make_group, make_step

from agpo_megatron.journal import Journal
from agpo_megatron.journal.records import read_scores
from agpo_megatron.policy.objective import LossSettings


def test_samples_are_scored_with_either_weights_and_trained_on(tmp_path: Path) -> None:
    folder = policy_models.save(policy_models.hf_model("llama"), tmp_path / "hf")
    journal = Journal(tmp_path / "journal")
    journaled = journal.append([make_group(0), make_group(1)])
    rows = [[ref.segment, ref.row, j.digest] for j in journaled for ref in j.refs]
    with policy_models.one_rank(folder) as policy:
        from agpo_megatron.trainer.service import TrainerService

        publisher: Any = SimpleNamespace(open=None)
        service = TrainerService(policy, publisher, SimpleNamespace(), folder)  # type: ignore[arg-type]

        def score(weights: str) -> tuple[dict[str, list[float]], float]:
            path = tmp_path / f"{weights}.arrow"
            answer = service.score_samples(
                str(journal.folder), rows, [[[0, 3], [1, 2, 4, 5]]], weights, str(path)
            )
            return read_scores(path, answer["digest"]), answer["entropy"]

        policy.keep_reference()
        start, entropy = score("policy")
        assert set(start) == {s.sample_id for j in journaled for s in j.group.samples}
        sample = journaled[0].group.samples[1]
        every = service.score(sample.prompt_tokens + sample.response_tokens, 1.0)["logprobs"]
        assert start[sample.sample_id] == pytest.approx(
            every[len(sample.prompt_tokens) :], abs=1e-5
        )
        assert 0 < entropy < 4.2  # log 61

        name = journal.commit_step(make_step(1, journaled))
        loss = {**vars(LossSettings()), "kl_coef": 0.1, "old_logprobs": "rollout"}
        stats = service.update(str(journal.folder), name, 1, [[[0, 1], [2, 3, 4, 5]]], loss, 1e-2)
        assert stats["loss/kl"] > 0, "against the journaled reference log-probs"
        assert stats["policy/ratio_mean"] != 1.0, "the ratio starts from the server's log-probs"
        trained = sum(len(s.loss_mask) - 1 for j in journaled for s in j.group.samples)
        assert stats["tokens/trained"] == trained, "a token of correction 0 does not train"
        moved, _ = score("policy")
        reference, _ = score("reference")
        assert moved != start
        for name, values in start.items():
            assert reference[name] == pytest.approx(values, abs=1e-5)
