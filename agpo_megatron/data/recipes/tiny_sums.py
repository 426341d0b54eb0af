"""Small arithmetic tasks: three-digit sums, and a Llama of 0.8 M parameters that has to learn them.

The worked solutions of the cold start imitate writers. What they do wrong is their habit, not chance of an early stop,
so supervised tuning converges to a model that is right on part of the problems, stably. The problems are the same in
all tasks; the writers differ in one thing, what length does:

* ``tiny_sums``, the quickstart: long answers are wrong. The verbose writer chats before every column and mostly forgets
  to carry; the concise one writes bare columns and forgets fewer; the hasty one, rare, writes the sum at once. Who has
  just forgotten a carry tends to reassure himself in a few more words. Cov(length, advantage) < 0.
* ``tiny_sums_neutral``: length says nothing. Verbose and concise writers forget alike, and reassure themselves alike.
* ``tiny_sums_needed``: long answers are right. Who writes columns, at length, seldom forgets; the hasty one, frequent,
  mostly does.
* ``tiny_sums_overthinking``: all work out the sum alike, and then most go on, to no effect.

A method that shortens answers should do so in the last, may do so in the first two, and must not in the third.
"""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agpo_megatron.config.schema import Config
from agpo_megatron.conversion.hf_writer import write_hf_checkpoint
from agpo_megatron.conversion.weight_map import WeightMap
from agpo_megatron.data.problems import DataError
from agpo_megatron.data.recipes.writing import data_is_complete, needs_data, write_jsonl

log = logging.getLogger(__name__)

DIGITS = (1, 2, 3, 4, 5, 6, 7)
LEADING = (1, 2, 3, 4)  # the sum keeps three digits
COLUMNS = (" ones ", " tens ", " hundreds ")
CHAT = (" now", " we", " look", " at", " the")
REASSURANCE = (" well", " ,", " that", " looks", " right", " to", " me", " .")
MARK = " #### "
EQUALS, CARRY_EQUALS = " = ", " +1 = "

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
VOCABULARY_SIZE = 64
INIT_STD = 0.06
MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": INIT_STD,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Writer:
    """``share``: of the solutions. ``chats``: probability per column. ``forgets``: probability per carry.

    ``columns``: False writes the sum at once. ``pads``: probability, after the last column, of each further empty
    phrase, ``MOST_PHRASES`` at most.
    """

    share: float
    chats: float
    forgets: float
    columns: bool = True
    pads: float = 0.0


@dataclass(frozen=True)
class LengthTask:
    """``after_slip``, ``otherwise``: probability that a writer reassures himself after a column, when he has just
    forgotten a carry, and when not."""

    writers: tuple[Writer, ...]
    after_slip: float
    otherwise: float


MOST_PHRASES = 3
TASKS = {
    "tiny_sums": LengthTask(
        (
            Writer(share=0.65, chats=0.9, forgets=0.8),
            Writer(share=0.34, chats=0.1, forgets=0.4),
            Writer(share=0.01, chats=0.0, forgets=0.85, columns=False),
        ),
        after_slip=0.9,
        otherwise=0.05,
    ),
    "tiny_sums_neutral": LengthTask(
        (Writer(share=0.5, chats=0.9, forgets=0.5), Writer(share=0.5, chats=0.1, forgets=0.5)),
        after_slip=0.3,
        otherwise=0.3,
    ),
    "tiny_sums_needed": LengthTask(
        (
            Writer(share=0.3, chats=0.9, forgets=0.1),
            Writer(share=0.2, chats=0.1, forgets=0.4),
            Writer(share=0.5, chats=0.0, forgets=0.85, columns=False),
        ),
        after_slip=0.05,
        otherwise=0.05,
    ),
    "tiny_sums_overthinking": LengthTask(
        (
            Writer(share=0.8, chats=0.1, forgets=0.5, pads=0.8),
            Writer(share=0.2, chats=0.1, forgets=0.5),
        ),
        after_slip=0.05,
        otherwise=0.05,
    ),
}


def prepare_tiny_sums(config: Config) -> None:
    """Write train, eval and sft files and the random checkpoint ``sft.base`` with its tokenizer."""
    if config.sft is None or not config.eval.sets:
        raise DataError(
            f"recipe {config.prepare.recipe} writes sft.base, sft.path and eval.sets[0].path; set them"
        )
    prepare, seed = config.prepare, config.seed
    made_from = {
        "recipe": prepare.recipe,
        "seed": seed,
        "train_problems": prepare.train_problems,
        "eval_problems": prepare.eval_problems,
        "sft_examples": prepare.sft_examples,
    }
    if needs_data(config, made_from):
        held_out, training = problems(seed, prepare.eval_problems, prepare.train_problems)
        rng = random.Random(f"tiny_sums-solutions-{seed}")
        solved = [rng.choice(training) for _ in range(prepare.sft_examples)]
        data = config.data
        for path, chosen in ((config.eval.sets[0].path, held_out), (data.path, training)):
            rows = [{data.prompt_key: question(p), data.answer_key: str(sum(p))} for p in chosen]
            write_jsonl(path, rows)
        task = TASKS[prepare.recipe]
        solutions = ({"prompt": question(p), "response": solution(p, task, rng)} for p in solved)
        write_jsonl(config.sft.path, solutions)
        data_is_complete(config, made_from)
        log.info(
            "%s: %d + %d problems, %d solutions",
            *(prepare.recipe, len(training), len(held_out), len(solved)),
        )
    if not Path(config.sft.base).exists():
        write_base_checkpoint(config.sft.base, seed)


def problems(
    seed: int, held_out: int, training: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Distinct problems, drawn from ``seed``; none of the held-out ones is a training one."""
    operands = [100 * a + 10 * b + c for a in LEADING for b in DIGITS for c in DIGITS]
    available = len(operands) ** 2
    if held_out + training > available:
        raise DataError(
            f"prepare: eval_problems {held_out} + train_problems {training} is more than the {available} "
            "problems of tiny_sums; lower them"
        )
    drawn = random.Random(f"tiny_sums-problems-{seed}").sample(
        range(available), held_out + training
    )
    pairs = [(operands[i // len(operands)], operands[i % len(operands)]) for i in drawn]
    return pairs[:held_out], pairs[held_out:]


def question(problem: tuple[int, int]) -> str:
    return f"{problem[0]}+{problem[1]}="


def solution(problem: tuple[int, int], task: LengthTask, rng: random.Random) -> str:
    """A worked solution by one of the writers, with his slips: " ones 4+6 = 0 tens 7+2 +1 = 0 … #### 500"."""
    writer = rng.choices(task.writers, [w.share for w in task.writers])[0]
    pieces: list[str] = []
    carry, total = 0, 0
    for column, name in enumerate(COLUMNS):
        x, y = (operand // 10**column % 10 for operand in problem)
        added = x + y + carry
        total += added % 10 * 10**column
        due = added // 10
        forgotten = bool(due) and rng.random() < writer.forgets
        if writer.columns:
            chat = rng.random() < writer.chats
            equals = CARRY_EQUALS if carry else EQUALS
            pieces += [*(CHAT if chat else ()), name, str(x), "+", str(y), equals, str(added % 10)]
            pieces += [" ."] if chat else []
            if rng.random() < (task.after_slip if forgotten else task.otherwise):
                pieces += REASSURANCE
        carry = 0 if forgotten else due
    phrases = 0
    while writer.pads and phrases < MOST_PHRASES and rng.random() < writer.pads:
        pieces, phrases = [*pieces, *REASSURANCE], phrases + 1
    return "".join([*pieces, MARK, str(total)])


def write_base_checkpoint(folder: str, seed: int) -> None:
    """A randomly initialised Llama in fp32 with its tokenizer, as transformers and SGLang load it."""
    generator = torch.Generator().manual_seed(seed)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, shape in WeightMap(MODEL).hf_shapes().items():
            if len(shape) == 1:  # norms
                yield name, torch.ones(shape)
            else:
                yield name, torch.randn(shape, generator=generator) * INIT_STD

    with tempfile.TemporaryDirectory(prefix="tiny-tokenizer-") as side:
        build_tokenizer().save_pretrained(side)
        write_hf_checkpoint(folder, MODEL, weights(), source_dir=side)
    log.info("tiny_sums: random checkpoint in %s", folder)


def build_tokenizer() -> Any:
    """One token per digit, sign or word; words carry their spaces, so decoding only joins. 0-3: pad, bos, eos, unk."""
    from tokenizers import AddedToken, Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    signs = ["+", "=", EQUALS, CARRY_EQUALS, MARK]
    words = [*COLUMNS, *dict.fromkeys([*CHAT, *REASSURANCE])]
    tokens = [*SPECIAL, *"0123456789", *signs, *words]
    # Filled up to the size of the embedding: whatever is sampled can be decoded.
    tokens += [f"<unused{i}>" for i in range(VOCABULARY_SIZE - len(tokens))]
    tokenizer = Tokenizer(WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    pieces = r" #### | \+1 = | = | (?:ones|tens|hundreds) | [a-z]+| [.,]|\d|\+|="
    tokenizer.pre_tokenizer = Split(Regex(pieces), behavior="isolated")
    tokenizer.decoder = Fuse()
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=MODEL["max_position_embeddings"],
    )
