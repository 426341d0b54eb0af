"""Rewards: a function of a problem and a response, run in worker processes that may hang, die or run out of memory.

What a reward function of one's own needs is here: ``from agpo_megatron.reward import Problem, Response, Reward``.
"""

from agpo_megatron.reward.contract import Problem, Response, Reward

__all__ = ["Problem", "Response", "Reward"]
