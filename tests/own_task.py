"""A team's own task for tests: a reward of ten lines, and two sources of different kinds with different rewards."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tiny_run import write_problems

CLOSENESS = '''
"""Partial credit: the closer the last digit, the more."""
from agpo_megatron.reward import Reward

def score(problem, response, *, scale=1.0):
    digits = [int(c) for c in response.text if c.isdigit()]
    if not digits:
        return 0.0
    near = 1 - abs(digits[-1] - int(problem.answer)) / 10
    return Reward(scale * near, correct=near == 1, parts={"near": near, "row": problem.fields["row"]})
'''


def write_task(folder: Path) -> dict[str, object]:
    """A JSONL source with numeric as its reward and a Parquet source, nested, with a reward of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "closeness.py").write_text(CLOSENESS)
    write_problems(folder / "sums.jsonl", 60)
    rows = [
        {"extra": {"question": f"{i}+{i}:"}, "gold": {"answer": str(2 * i % 10)}, "row": i}
        for i in range(10)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "doubles.parquet")
    own = [{"name": f"{folder}/closeness.py:score", "options": {"scale": 0.5}}]
    doubles = {
        "path": str(folder / "doubles.parquet"),
        "name": "doubles",
        "prompt_key": "extra.question",
        "answer_key": "gold.answer",
        "reward": own,
    }
    sums = {"path": str(folder / "sums.jsonl"), "name": "sums", "weight": 1.0}
    return {
        "data.path": "",
        "data.sources": [sums, {**doubles, "weight": 1.0}],
        "eval.sets": [
            {"path": str(folder / "sums.jsonl"), "max_prompts": 5},
            {**doubles, "n": 4, "temperature": 1.0, "max_response_tokens": 6},
        ],
        "eval.every": 2,
    }
