"""The trainer's answer to a score command: real policy, real journal."""

from __future__ import annotations

from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made
import numpy as np
import policy_models
import pytest
import torch
from test_journal import make_batch, make_group

from agpo_megatron.journal import Journal
from agpo_megatron.journal.reader import read_file
from agpo_megatron.journal.records import read_scores

pytestmark = pytest.mark.processes


def test_samples_are_scored_with_either_weights_and_trained_on(tmp_path: Path) -> None:
    folder = policy_models.save(policy_models.hf_model("llama"), tmp_path / "hf")
    journal = Journal(tmp_path / "journal")
    journaled = journal.append([make_group(0), make_group(1)])
    places = [list(astuple(block)) for j in journaled for block in j.blocks]
    settings = made.loss(kl_coef=0.1, old_logprobs="rollout")
    with policy_models.one_rank(folder) as policy:
        from agpo_megatron.trainer.service import TrainerService

        publisher: Any = SimpleNamespace(open=None)
        channel: Any = SimpleNamespace()
        service = TrainerService(policy, publisher, channel, folder, settings, 60.0)

        def score(weights: str) -> tuple[dict[str, Any], float]:
            path = tmp_path / f"{weights}.arrow"
            answer = service.score_samples(
                str(journal.folder), places, [[[0, 3], [1, 2, 4, 5]]], weights, str(path)
            )
            return read_scores(path, read_file(path, answer["digest"])), answer["entropy"]

        policy.keep_reference()
        start, entropy = score("policy")
        assert set(start) == {s.sample_id for j in journaled for s in j.group.samples}
        sample = journaled[0].group.samples[1]
        tokens = [*map(int, sample.prompt_tokens), *map(int, sample.response_tokens)]
        every = service.score(tokens, 1.0)["logprobs"]
        assert start[sample.sample_id] == pytest.approx(
            every[len(sample.prompt_tokens) :], abs=1e-5
        )
        assert 0 < entropy < 4.2  # log 61

        record, decided = make_batch(1, journaled)
        samples = [s for j in journaled for s in j.group.samples]
        decided["ref_logprobs"][0] = np.full(len(samples[0].response_tokens), -1.5, np.float32)
        del decided["old_logprobs"]
        record, name = journal.commit(record, decided)
        stats = service.update(
            str(journal.folder), name, 1, [[[0, 1], [2, 3, 4, 5]]], 1e-2, limited=False, hold=False
        )
        assert stats["loss/kl"] > 0, "against the journaled reference log-probs"
        assert stats["policy/ratio_mean"] != 1.0, "the ratio starts from the server's log-probs"
        trained = sum(len(s.loss_mask) - 1 for s in samples) + 1
        assert stats["tokens/trained"] == trained, "a token of correction 0 does not train"
        with pytest.raises(
            ValueError, match="step 4 was asked for, the weights are those of step 1"
        ):
            service.update(str(journal.folder), name, 4, [[[]]], 1e-2, limited=False, hold=False)
        moved, _ = score("policy")
        reference, _ = score("reference")
        for name, values in start.items():
            assert not np.array_equal(moved[name], values)
            assert reference[name] == pytest.approx(values, abs=1e-5)

        # The gate of a step is the one that the record has for it: open, then closed.
        other = Journal(tmp_path / "gated")
        record, decided = make_batch(1, other.append([make_group(0), make_group(1)]), updates=2)
        del decided["old_logprobs"]
        record, name = other.commit(
            replace(record, entropy_coef=0.0, gate_levels=[1.0, 0.0]), decided
        )
        gated = TrainerService(
            policy, publisher, channel, folder, made.loss(adaptive="random"), 60.0
        )
        for step, gain in ((1, 1.0), (2, 0.0)):
            rows = record.rows(step)
            stats = gated.update(
                str(other.folder), name, step, [[rows]], 1e-4, limited=False, hold=False
            )
            assert (stats["loss/clip_gate"], stats["grad_norm"] > 0) == (gain, gain > 0)

        with torch.no_grad():
            next(iter(policy.chunks[0].parameters())).fill_(float("nan"))
        with pytest.raises(FloatingPointError, match="under the policy weights are not finite"):
            score("policy")
