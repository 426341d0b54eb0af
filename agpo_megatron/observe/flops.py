"""Model FLOPs of a training step, for MFU: what the mathematics needs, whatever is recomputed or padded.

Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix B): a token costs 6 N + 12 L H Q T floating-point operations,
forward and backward, with N parameters, L layers, H heads of Q values, and T tokens in its sequence: 2 N for a
multiply-add with each parameter forward and twice that backward, and 6 T H Q L for each of q k^T and the sum of v. The
causal half of the attention is not taken off, as there.
"""

from __future__ import annotations

from collections.abc import Iterable

from agpo_megatron.conversion.shape import ModelShape


def active_parameters(shape: ModelShape) -> int:
    """Parameters of the layers' matrices that a token is multiplied with: of experts the ``per_token`` chosen ones."""
    attention = shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    ffn = 3 * shape.hidden * shape.ffn
    if shape.experts is not None:
        router = shape.hidden * shape.experts.count
        ffn = router + 3 * shape.hidden * shape.experts.ffn * shape.experts.per_token
    return shape.layers * (attention + ffn)


def training_flops(shape: ModelShape, lengths: Iterable[int], trained: int) -> float:
    """FLOPs of forward and backward of sequences of ``lengths`` tokens of which ``trained`` reach the LM head.

    sum over sequences of T (6 N + 12 L H Q T), plus 6 V hidden for each trained token: the others never reach the head
    (docs/design.md, idea 3), and looking up an embedding multiplies nothing.
    """
    weights = 6.0 * active_parameters(shape)
    attention = 12.0 * shape.layers * shape.heads * shape.head_dim
    layers = sum(n * (weights + attention * n) for n in map(int, lengths))
    return layers + 6.0 * shape.vocab_size * shape.hidden * int(trained)


def utilisation(flops: float, seconds: float, peak_tflops: float, devices: int) -> float:
    """MFU: the share of what ``devices`` of ``peak_tflops`` (10^12 FLOP/s) each could have done in ``seconds``."""
    return flops / (seconds * peak_tflops * 1e12 * devices)
