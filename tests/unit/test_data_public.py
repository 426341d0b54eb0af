"""Public data sets load as they are published: GSM8K as Parquet in a folder of splits, and lists of messages."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agpo_megatron.config.task import DataConfig, EvalSetConfig, TrainSourceConfig
from agpo_megatron.data.problems import load_problems
from agpo_megatron.data.recipes.tiny_sums import build_tokenizer
from agpo_megatron.reward import Response
from agpo_megatron.reward.numeric import numeric
from agpo_megatron.reward.rewards import reference_check

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
pytestmark = pytest.mark.skipif(
    not GSM8K.is_dir(), reason=f"{GSM8K} is not there: GSM8K is not part of this repository"
)


def published(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (GSM8K / f"{split}.jsonl").read_text().splitlines()]


def test_gsm8k_from_parquet(tmp_path: Path) -> None:
    for split in ("train", "test"):
        table = pa.Table.from_pylist(published(split))
        pq.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    data = DataConfig(prompt_key="question", answer_key="answer", max_prompt_tokens=2048)
    check = reference_check("numeric")
    train = load_problems(
        TrainSourceConfig(path=str(tmp_path)), data, build_tokenizer(), check=check
    )
    test = load_problems(
        EvalSetConfig(path=str(tmp_path), split="test"), data, build_tokenizer(), check=check
    )
    assert (len(train), len(test)) == (7473, 1319)
    problem = test.problem(0)
    assert problem.text.startswith("Janet’s ducks lay 16 eggs per day.")
    assert numeric(problem, Response("so she makes $18 every day"))
    assert not numeric(problem, Response("so she makes $17 every day"))


def test_a_list_of_messages(tmp_path: Path) -> None:
    """As verl prepares GSM8K: messages, the reference inside reward_model."""
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": row["question"]}],
            "reward_model": {"ground_truth": row["answer"].split("#### ")[1], "style": "rule"},
            "extra_info": {"index": index, "split": "test"},
        }
        for index, row in enumerate(published("test")[:100])
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    data = DataConfig(
        chat_template=True, answer_key="reward_model.ground_truth", max_prompt_tokens=2048
    )
    source = TrainSourceConfig(path=str(tmp_path / "test.parquet"))
    problems = load_problems(source, data, tokenizer, check=reference_check("numeric"))
    assert len(problems) == 100
    problem = problems.problem(7)
    assert (problem.text, problem.answer) == (
        rows[7]["prompt"][0]["content"],
        rows[7]["reward_model"]["ground_truth"],
    )
    assert problem.fields["extra_info"] == {"index": 7, "split": "test"}
