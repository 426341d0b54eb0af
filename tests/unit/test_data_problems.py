"""Rows to prompt tokens and problems: texts, messages, templates, filters; what is refused, with its place."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agpo_megatron.config.task import DataConfig, EvalSetConfig, TrainSourceConfig
from agpo_megatron.controller.eval_scores import SAMPLES_SCHEMA
from agpo_megatron.data.problems import (
    DataError,
    Duplicates,
    ProblemSet,
    load_problems,
    pass_rates,
    problem_id,
)
from agpo_megatron.data.recipes.tiny_sums import build_tokenizer
from agpo_megatron.data.sft_examples import load_sft_examples
from agpo_megatron.data.tokenizer import load_tokenizer

# Roles and tools as digits, so that the small tokenizer has a token for each of their characters.
CHAT = (
    "{% if tools %}9{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tool here') }}{% endif %}"
    "{{ {'system': '0', 'user': '1', 'assistant': '2'}[m['role']] }}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}{% if short %}7{% endif %}"
)


def loaded(
    tmp_path: Path, rows: list[Any], seen: Duplicates | None = None, rates: Any = None, **data: Any
) -> ProblemSet:
    file = tmp_path / "problems.jsonl"
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    source = TrainSourceConfig(path=str(file))
    return load_problems(source, DataConfig(**data), tokenizer(), seen, rates)


def tokenizer() -> Any:
    made = build_tokenizer()
    made.chat_template = CHAT
    return made


def shown(problems: ProblemSet) -> list[str]:
    return ["".join(tokenizer().convert_ids_to_tokens(t.tolist())) for t in problems.tokens]


def said(*messages: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in messages]


def test_a_text_is_its_prefix_text_and_suffix_and_every_field_reaches_the_reward(
    tmp_path: Path,
) -> None:
    rows = [{"q": "12+34", "a": "46", "level": [1, {"x": 2.5}]}, {"q": "1+1", "a": 2}]
    problems = loaded(tmp_path, rows, prompt_key="q", answer_key="a", prefix="1+2=3", suffix="=")
    assert shown(problems) == ["<bos>1+2=312+34=", "<bos>1+2=31+1="]
    first = problems.problem(0)
    assert (first.text, first.answer, first.source) == ("12+34", "46", "problems.jsonl")
    assert dict(first.fields) == rows[0]
    assert problems.problem(1).answer == "2"


def test_messages_go_through_the_template_with_what_it_is_told(tmp_path: Path) -> None:
    rows = [
        {"prompt": said(("system", "5"), ("user", "3+4")), "answer": "7"},
        {"prompt": said(("user", "3+4")), "answer": "7"},
        {"prompt": "3+4", "answer": "7"},
        {
            "prompt": said(
                ("user", "1+1"), ("assistant", "2"), ("user", "3+4"), ("assistant", "7")
            ),
            "answer": 7,
        },
        {
            "prompt": said(
                ("user", [{"type": "text", "text": "3+"}, {"type": "text", "text": "4"}])
            ),
            "answer": 7,
        },
    ]
    problems = loaded(
        tmp_path,
        rows,
        chat_template=True,
        system="8",
        suffix="+0",
        template_options={"short": True},
    )
    assert shown(problems) == [
        "0513+4+0=7",
        "0813+4+0=7",
        "0813+4+0=7",
        "0811+12213+4+0=7",
        "0813+4+0=7",
    ]
    assert problems.problem(3).text == "3+4"
    with_tools = loaded(
        tmp_path, [{"prompt": "3", "answer": "3", "t": [{}]}], chat_template=True, tools_key="t"
    )
    assert shown(with_tools) == ["913="]


def test_a_conversation_can_hold_its_own_answer(tmp_path: Path) -> None:
    rows = [{"messages": said(("user", "3+4"), ("assistant", "#### 7"))}]
    problems = loaded(
        tmp_path, rows, chat_template=True, prompt_key="messages", answer_key="messages.-1.content"
    )
    assert (shown(problems), problems.problem(0).answer) == (["13+4="], "#### 7")
    assert loaded(tmp_path, [{"prompt": "1"}], answer_key="").problem(0).answer == ""


def test_nested_fields_of_parquet(tmp_path: Path) -> None:
    rows = [
        {"prompt": said(("user", "3+4")), "reward_model": {"ground_truth": "7", "style": "rule"}}
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = EvalSetConfig(
        path=str(tmp_path / "a.parquet"), answer_key="reward_model.ground_truth", name="mine"
    )
    problems = load_problems(
        source, DataConfig(chat_template=True, answer_key="other"), tokenizer()
    )
    problem = problems.problem(0)
    assert (problem.answer, problem.source) == ("7", "mine")
    assert problem.fields["reward_model"]["style"] == "rule"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "2"}, r"line 2: no field 'answer'.*answer_key"),
        ("oops", "line 2: is not JSON"),
        ({"prompt": "1234", "answer": "1"}, "line 2: the prompt has 5 tokens.*max_prompt_tokens 4"),
        (
            {"prompt": 12, "answer": "1"},
            "line 2: field 'prompt' is a int, neither text nor a list of messages",
        ),
        ({"prompt": [], "answer": "1"}, "line 2: field 'prompt' is a list, neither text"),
        (
            {"prompt": ["1+1"], "answer": "1"},
            "line 2: .*not of messages {'role', 'content'}: '1\\+1'",
        ),
        ({"prompt": {"x": 1}, "answer": "1"}, "line 2: field 'prompt' is a dict"),
        (
            {"prompt": said(("user", None)), "answer": "1"},
            "line 2: the user message in 'prompt' has no text",
        ),
        (
            {"prompt": said(("user", [{"type": "image"}])), "answer": "1"},
            "has no text as its content",
        ),
        (
            {"prompt": said(("assistant", "1")), "answer": "1"},
            "nothing but messages of the assistant",
        ),
        ({"prompt": said(("system", "1"), ("user", "1")), "answer": "1"}, "need a chat template"),
        ("[1]", "not a JSON object"),
    ],
)
def test_bad_rows_are_refused_with_their_line(tmp_path: Path, row: Any, message: str) -> None:
    rows = [{"prompt": "1", "answer": "1"}, row]
    with pytest.raises(DataError, match=message):
        loaded(tmp_path, rows, max_prompt_tokens=4)
    assert len(loaded(tmp_path, rows, max_prompt_tokens=4, max_bad_rows=1)) == 1


def test_a_template_that_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="line 1: the chat template refuses the messages: .*no tool here"
    ):
        loaded(
            tmp_path,
            [{"prompt": said(("tool", "1"), ("user", "1")), "answer": "1"}],
            chat_template=True,
        )


def test_long_prompts_are_dropped_if_so_configured(tmp_path: Path) -> None:
    rows = [
        {"prompt": "1", "answer": "1"},
        {"prompt": "1234", "answer": "1"},
        {"prompt": "2", "answer": "2"},
    ]
    problems = loaded(tmp_path, rows, max_prompt_tokens=4, overlong="drop")
    assert [problems.problem(i).answer for i in range(len(problems))] == ["1", "2"]
    assert problems.place(1).endswith("line 3")
    with pytest.raises(DataError, match="none of 3 rows is left"):
        loaded(tmp_path, rows, max_prompt_tokens=1, overlong="drop")


def test_duplicates_are_reported_over_all_sources(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"prompt": "1", "answer": "1"},
        {"prompt": "2", "answer": "1"},
        {"prompt": "1", "answer": "2"},
    ]
    with caplog.at_level(logging.WARNING):
        loaded(tmp_path, rows)
    assert "1 prompts stand there more than once" in caplog.text
    seen = Duplicates()
    loaded(tmp_path, rows[:2], seen)
    assert seen.report() == ""
    (tmp_path / "other").mkdir()
    loaded(tmp_path / "other", rows[1:2], seen)
    assert "other/problems.jsonl, line 1 repeats" in seen.report()


def test_problems_are_chosen_by_the_pass_rate_of_an_evaluation(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "answer": "1"} for i in range(4)]
    samples = [
        {"problem": i, "problem_id": problem_id(said(("user", str(i)))), "correct": right}
        for i, verdicts in enumerate([[0, 0], [0, 1], [1, 1]])
        for right in map(bool, verdicts)
    ]
    path = tmp_path / "samples.arrow"
    with pa.ipc.new_file(str(path), SAMPLES_SCHEMA) as sink:
        sink.write_table(pa.Table.from_pylist(samples, SAMPLES_SCHEMA))
    rates = pass_rates(str(path))
    assert sorted(rates.values()) == [0.0, 0.5, 1.0]
    problems = loaded(
        tmp_path, rows, rates=rates, suffix="+"
    )  # another suffix: still the same problems
    assert [problems.problem(i).text for i in range(len(problems))] == ["1", "3"]
    assert len(loaded(tmp_path, rows, rates=rates, pass_rate=[0.0, 0.5])) == 3
    with pytest.raises(DataError, match="no samples of an evaluation"):
        pass_rates(str(tmp_path / "problems.jsonl"))


def test_what_a_source_does_not_say_holds_as_in_data() -> None:
    data = DataConfig(path="x", suffix="s", system="y", split="train", prompt_key="p")
    own = data.of(TrainSourceConfig(path="z", suffix="", split="test"))
    assert (own.suffix, own.split, own.system, own.prompt_key) == ("", "test", "y", "p")
    assert [s.path for s in data.each()] == ["x"]
    assert [s.path for s in DataConfig(sources=[TrainSourceConfig(path="a")]).each()] == ["a"]
    assert TrainSourceConfig(path="a/b/").shown == "b"


def test_a_worked_solution_ends_with_eos_and_has_loss_on_the_response_only(tmp_path: Path) -> None:
    (tmp_path / "sft.jsonl").write_text('{"prompt": "1+2", "response": " #### 3"}\n')
    made = build_tokenizer()
    (group,) = load_sft_examples(str(tmp_path / "sft.jsonl"), DataConfig(suffix="="), made)
    (sample,) = group.samples
    assert made.convert_ids_to_tokens(sample.prompt_tokens.tolist()) == ["<bos>", *"1+2="]
    assert made.convert_ids_to_tokens(sample.response_tokens.tolist()) == [" #### ", "3", "<eos>"]
    assert sample.loss_mask.tolist() == [1, 1, 1]


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*tokenizer.json"):
        load_tokenizer(str(tmp_path))
