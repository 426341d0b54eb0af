"""The trainer's answers to commands: real policy, real journal."""

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

from agpo_megatron.algorithm.limits import Limit
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
        stats = service.update(str(journal.folder), name, 1, [[[0, 1], [2, 3, 4, 5]]], 1e-2)
        assert stats["loss/kl"] > 0, "against the journaled reference log-probs"
        assert stats["policy/ratio_mean"] != 1.0, "the ratio starts from the server's log-probs"
        trained = sum(len(s.loss_mask) - 1 for s in samples) + 1
        assert stats["tokens/trained"] == trained, "a token of correction 0 does not train"
        with pytest.raises(
            ValueError, match="step 4 was asked for, the weights are those of step 1"
        ):
            service.update(str(journal.folder), name, 4, [[[]]], 1e-2)
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
            stats = gated.update(str(other.folder), name, step, [[rows]], 1e-4)
            assert (stats["loss/clip_gate"], stats["grad_norm"] > 0) == (gain, gain > 0)

        with torch.no_grad():
            next(iter(policy.chunks[0].parameters())).fill_(float("nan"))
        with pytest.raises(FloatingPointError, match="under the policy weights are not finite"):
            score("policy")


def test_steps_are_passed_over_and_rolled_back(tmp_path: Path) -> None:
    """Back to a checkpoint, or to the initial weights, by value; the number of the step goes on, and the next step is
    the one that a trainer takes which never saw those in between."""
    folder = policy_models.save(policy_models.hf_model("llama"), tmp_path / "hf")
    journal = Journal(tmp_path / "journal")
    journaled = journal.append([make_group(0), make_group(1)])
    limit = Limit("grad_norm", "grad_norm", 1e-9)
    names = []
    for step in (1, 2, 3, 4, 5):
        record, decided = make_batch(step, journaled)
        for key in ("ref_logprobs", "old_logprobs"):
            decided.pop(key, None)
        names.append(journal.commit(replace(record, updates=1, limits=[limit]), decided)[1])
    plan = [[[0, 1], [2, 3, 4, 5]]]

    def weights(service: Any) -> dict[str, torch.Tensor]:
        return {n: t.clone() for n, t in service._policy.named_hf_tensors()}

    def run(kinds: str, back_to: str | None) -> list[dict[str, torch.Tensor]]:
        with policy_models.one_rank(folder) as policy:
            from agpo_megatron.trainer.service import TrainerService

            channel: Any = SimpleNamespace(open=None)
            service = TrainerService(policy, channel, channel, folder, made.loss(), 60.0)
            found = [weights(service)]
            for step, kind in enumerate(kinds, start=1):
                update = (str(journal.folder), names[step - 1], step, plan, 1e-2)
                if kind == "u":
                    assert "skipped" not in service.update(*update)
                elif kind == "l":
                    assert service.update(*update, limited=True)["skipped"] == 1.0
                elif kind == "p":
                    service.pass_over(step)
                elif kind == "r":
                    assert service.update(*update, hold=True)["skipped"] == 1.0
                    service.roll_back(back_to, step)
                found.append(weights(service))
                if back_to and step == 1 and not Path(back_to).exists():
                    service.save(back_to, 1, wait=True)
            with pytest.raises(ValueError, match=f"the weights are those of step {len(kinds)}"):
                service.pass_over(len(kinds))
            return found

    def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(one[name], other[name]) for name in one)

    saved = str(tmp_path / "step-1")
    back, passed = run("uulru", saved), run("upppu", None)
    assert same(back[2], back[3]) and not same(back[1], back[2])
    assert same(back[1], back[4]) and same(back[5], passed[5])
    anew, never = run("uulru", None), run("ppppu", None)
    assert same(anew[0], anew[4]) and same(anew[5], never[5]) and not same(anew[5], back[5])
