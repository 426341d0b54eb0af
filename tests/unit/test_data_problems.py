"""JSONL problems to prompt tokens: what is read, and what is refused with file, line and fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from agpo_megatron.config.schema import DataConfig
from agpo_megatron.data.problems import DataError, load_problems
from agpo_megatron.data.recipes.tiny_sums import build_tokenizer
from agpo_megatron.data.sft_examples import load_sft_examples
from agpo_megatron.data.tokenizer import load_tokenizer

CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"


def written(tmp_path: Path, *lines: str) -> str:
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(line + "\n" for line in lines))
    return str(file)


def test_a_problem_is_its_prefix_text_and_suffix(tmp_path: Path) -> None:
    path = written(tmp_path, '{"q": "12+34", "a": "46", "unused": [1]}', '{"q": "1+1", "a": "2"}')
    data = DataConfig(path=path, prompt_key="q", answer_key="a", prefix="1+2=3", suffix="=")
    tokenizer = build_tokenizer()
    problems = load_problems(path, data, tokenizer)
    assert [(p.text, p.answer) for p in problems] == [("12+34", "46"), ("1+1", "2")]
    assert tokenizer.convert_ids_to_tokens(problems[0].tokens) == ["<bos>", *"1+2=312+34="]


def test_the_chat_template_adds_its_own_special_tokens_only(tmp_path: Path) -> None:
    path = written(tmp_path, '{"prompt": "12+34", "answer": 46}')
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT
    (problem,) = load_problems(path, DataConfig(path=path, chat_template=True), tokenizer)
    assert tokenizer.convert_ids_to_tokens(problem.tokens) == list("12+34=")
    assert problem.answer == "46"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"problems\.jsonl is empty"),
        (
            ['{"prompt": "1", "answer": "1"}', '{"prompt": "2"}'],
            r"line 2: no field 'answer'.*data\.answer_key",
        ),
        (['{"prompt": "1", "answer": "1"}', "oops"], "line 2 is not JSON"),
        (
            ['{"prompt": "1", "answer": "1"}', '{"prompt": "1234", "answer": "1"}'],
            "line 2.*5 tokens.*max_prompt_tokens 4",
        ),
    ],
)
def test_bad_data_is_refused_with_its_line(tmp_path: Path, lines: list[str], message: str) -> None:
    path = written(tmp_path, *lines)
    with pytest.raises(DataError, match=message):
        load_problems(path, DataConfig(path=path, max_prompt_tokens=4), build_tokenizer())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        load_problems(path, DataConfig(path=path), build_tokenizer())


def test_a_worked_solution_ends_with_eos_and_has_loss_on_the_response_only(tmp_path: Path) -> None:
    path = written(tmp_path, '{"prompt": "1+2", "response": " #### 3"}')
    tokenizer = build_tokenizer()
    (group,) = load_sft_examples(path, DataConfig(path=path, suffix="="), tokenizer)
    (sample,) = group.samples
    assert tokenizer.convert_ids_to_tokens(sample.prompt_tokens) == ["<bos>", *"1+2="]
    assert tokenizer.convert_ids_to_tokens(sample.response_tokens) == [" #### ", "3", "<eos>"]
    assert sample.loss_mask.tolist() == [1, 1, 1]


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no tokenizer in .*tokenizer.json"):
        load_tokenizer(str(tmp_path))
