"""Checks for switches of ``algorithm`` that contradict each other or are seldom meant together, one reason each."""

from __future__ import annotations

from .advantage import WITHOUT_GROUP_BASELINE
from .settings import AlgorithmSettings, LossSettings


def check_algorithm(
    algorithm: AlgorithmSettings,
    *,
    max_response_tokens: int,
    max_staleness: int = 0,
) -> tuple[list[str], list[str]]:
    """Return (contradictions, warnings)."""
    rules = _contradictions(algorithm, max_response_tokens)
    doubts = _doubts_about_rewards(algorithm) + _doubts_about_the_loss(algorithm)
    resamples = algorithm.advantage.zero_variance == "resample"
    if max_staleness or resamples:
        cause = "advantage.zero_variance resample (which runs ahead by up to a batch)"
        cause = f"train.max_staleness {max_staleness}" if max_staleness else cause
        doubts += _doubts_about_staleness(algorithm.loss, cause)
    return [text for is_wrong, text in rules if is_wrong], [text for odd, text in doubts if odd]


def without_effect(loss: LossSettings, updates: int) -> str:
    """Name the settings that have no effect while every ratio is 1, in one line; "" where ratios can differ.

    The ratio starts from the weights that the batch starts from, not from those that generated it: staleness does not
    move it (that is what the correction is for), unless ``old_logprobs`` is rollout.
    """
    if updates > 1 or loss.old_logprobs == "rollout":
        return ""
    idle = (
        [] if loss.policy == "ppo" else [f"loss.policy {loss.policy} (its gradient is that of ppo)"]
    )
    idle += ["loss.clip_low", "loss.clip_high"] if loss.policy != "sapo" else []
    idle += ["loss.dual_clip"] if loss.dual_clip is not None else []
    idle += ["loss.kl.importance"] if loss.kl.importance else []
    return (
        "with train.updates_per_batch 1 every ratio is 1, however old the responses are: without effect are "
        + ", ".join(idle)
    )


def _contradictions(algorithm: AlgorithmSettings, limit: int) -> list[tuple[bool, str]]:
    loss, correction, length = algorithm.loss, algorithm.loss.correction, algorithm.length_reward
    clip = loss.clip
    gate = f"kind {clip.kind}" + (" with tau null" if clip.tau is None else "")
    return [
        (
            clip.has_level and (clip.scope != "batch" or clip.on != "policy"),
            f"algorithm.loss.clip: {gate} is decided by the controller on the policy loss of the whole step; use scope "
            "batch and on policy",
        ),
        (
            loss.policy == "nll",
            "algorithm.loss: policy nll imitates whatever was sampled, right or wrong; it is what "
            "`agpo-megatron sft` uses",
        ),
        (
            length.kind == "dapo_overlong" and (length.buffer or 1) > limit,
            f"algorithm.length_reward: buffer {length.buffer} exceeds rollout.max_response_tokens {limit}, so that "
            "every response would be overlong",
        ),
        (
            loss.dual_clip is not None and loss.policy != "ppo",
            f"algorithm.loss: dual_clip bounds the token ratio of policy ppo; {loss.policy} has no such bound: set "
            "dual_clip null",
        ),
        (
            loss.clip.on == "total" and loss.clip.scope != "batch",
            f"algorithm.loss.clip: on total with scope {loss.clip.scope} would split the KL and entropy terms too; use "
            "scope batch",
        ),
        (
            correction.kind != "none" and loss.old_logprobs == "rollout",
            f"algorithm.loss: correction {correction.kind} weighs the gap between server and trainer, which "
            "old_logprobs rollout already puts into the ratio; choose one",
        ),
        (
            correction.kind == "icepop" and correction.level != "token",
            "algorithm.loss.correction: icepop masks single tokens; for whole sequences use kind mis",
        ),
        (
            correction.kind in ("mis", "icepop") and correction.low >= correction.high,
            f"algorithm.loss.correction: low {correction.low:g} is not below high {correction.high:g}, so that nothing "
            "would pass",
        ),
        (
            loss.kl.importance and loss.kl.place == "reward",
            "algorithm.loss.kl: importance corrects the gradient of a loss term; in the reward there is none: set "
            "importance false",
        ),
    ]


def has_group_baseline(algorithm: AlgorithmSettings) -> bool:
    """Return whether advantages compare a response with the others of its group."""
    return algorithm.advantage.estimator not in WITHOUT_GROUP_BASELINE


def _doubts_about_rewards(algorithm: AlgorithmSettings) -> list[tuple[bool, str]]:
    advantage, loss = algorithm.advantage, algorithm.loss
    constant = advantage.zero_variance == "constant"
    return [
        (
            constant and loss.mask.zero_variance,
            "algorithm: advantage.zero_variance constant gives zero-variance groups a signal that "
            "loss.mask.zero_variance removes again; choose one",
        ),
        (
            loss.mask.zero_variance and not constant and not has_group_baseline(algorithm),
            f"algorithm: advantage.estimator {advantage.estimator} compares with the whole step, so that zero-variance "
            "groups have a signal too, which loss.mask.zero_variance removes",
        ),
        (
            constant and not has_group_baseline(algorithm),
            f"algorithm: advantage.zero_variance constant puts +1 and -1 in the place of what advantage.estimator "
            f"{advantage.estimator} says of zero-variance groups anyway",
        ),
        (
            constant and loss.clip.kind == "max0",
            "algorithm: +1 for groups that are all right makes the loss strongly negative, and loss.clip then closes "
            "on most steps",
        ),
        (
            constant and algorithm.shaping_separates,
            "algorithm: a length or KL term tells apart responses whose raw rewards agree, so that hardly a group is "
            "left to the +1 and -1 of advantage.zero_variance constant",
        ),
        (
            advantage.zero_variance == "resample" and loss.mask.zero_variance,
            "algorithm: advantage.zero_variance resample replaces the groups that loss.mask.zero_variance would drop; "
            "the mask acts on what is left when resample_factor runs out only",
        ),
    ]


def _doubts_about_staleness(loss: LossSettings, cause: str) -> list[tuple[bool, str]]:
    correction = loss.correction
    return [
        (
            correction.kind == "none" and loss.old_logprobs == "score",
            f"algorithm.loss.correction: kind none with {cause}: responses of older "
            "weights are trained on as if the policy had just written them, and several updates_per_batch make it "
            "worse; set kind tis",
        ),
        (
            correction.kind != "none" and correction.level == "sequence",
            f"algorithm.loss.correction: level sequence with {cause}: the product over a "
            "sequence explodes with the age of its tokens, and few sequences outweigh all others; use level token",
        ),
    ]


def _doubts_about_the_loss(algorithm: AlgorithmSettings) -> list[tuple[bool, str]]:
    loss, length = algorithm.loss, algorithm.length_reward
    bound = loss.clip.kind == "max0"
    return [
        (
            bound
            and has_group_baseline(algorithm)
            and loss.clip.scope in ("batch", "group")
            and loss.aggregation == "seq_mean_token_mean",
            "algorithm: with aggregation seq_mean_token_mean the on-policy loss of complete groups is identically 0, "
            "so loss.clip acts on rounding noise; use token_mean",
        ),
        (
            bound and loss.clip.scope in ("sequence", "token") and loss.clip.min >= 0,
            f"algorithm: loss.clip with scope {loss.clip.scope} and min {loss.clip.min:g} drops every positive "
            "advantage: training on mistakes only",
        ),
        (
            algorithm.advantage.length_projection > 0 and not has_group_baseline(algorithm),
            f"algorithm: advantage.estimator {algorithm.advantage.estimator} compares with the whole step, "
            "advantage.length_projection within a group only",
        ),
        (
            loss.clip.kind != "none" and loss.clip.scope == "micro_batch",
            "algorithm: with loss.clip.scope micro_batch the result depends on train.micro_batch_tokens and "
            "data_parallel; report them with it",
        ),
        (
            loss.mask.zero_variance and loss.mask.criterion == "sample",
            "algorithm: loss.mask.criterion sample also drops members that sit exactly at the mean of an informative "
            "group",
        ),
        (
            (bound or loss.clip.kind == "random")
            and loss.clip.on == "policy"
            and loss.has_other_terms,
            "algorithm: loss.clip gates the policy loss only; on steps with a closed gate KL and entropy terms still "
            "train",
        ),
        (
            loss.kl.coef > 0
            and loss.kl.place == "loss"
            and loss.kl.estimator == "k1"
            and not loss.kl.importance,
            "algorithm: the expected gradient of the k1 estimate in the loss is 0; use k2 or k3, importance, or place "
            "reward",
        ),
        (
            loss.kl.coef > 0 and loss.kl.place == "reward" and loss.kl.estimator != "k1",
            f"algorithm: in the reward only k1 is the unbiased KL penalty, not {loss.kl.estimator}",
        ),
        (
            loss.mask.truncated and length.kind == "dapo_overlong",
            "algorithm: loss.mask.truncated takes truncated responses out of the loss, so their length_reward penalty "
            "only moves the baseline of the others",
        ),
    ]
