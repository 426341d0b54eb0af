"""The sections of the configuration that say what the task is: data, reward, evaluation."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field

from agpo_megatron.algorithm.settings import Section


class PartConfig(Section):
    name: str
    """Reward function: as ``reward.function``."""
    weight: float = 1.0
    """Factor of its value in the sum of the parts."""
    options: dict[str, Any] = Field({})
    """Keyword arguments of the function (docs/rewards.md; for instance ``extract``)."""


class RewardConfig(Section):
    function: str | list[PartConfig] = "numeric"
    """``numeric``, ``math``, ``choice``, ``exact``, ``regex``, ``format``, ``code``, ``http``, ``judge``, one of your
    own as ``package.module:name`` or ``path/to/file.py:name``, or a list of parts, each a section of the keys below."""
    correct: float = 1.0
    """Reward of a right answer where a function says only right or wrong."""
    wrong: float = 0.0
    """Reward of a wrong answer there, and of every answer whose verification ended in an error."""
    correct_at: float = 1.0
    """Value from which a response counts as correct, for accuracy and length reward, where no function says so."""
    workers: int | None = Field(None, ge=1)
    """Worker processes; null: half the cores, at most 16."""
    timeout: float = Field(10.0, gt=0)
    """Seconds per answer; then it scores ``wrong``, and the journal says why (``reward_error``)."""
    memory_mb: int = Field(4096, ge=256)
    """Private memory of a worker; a function that loads a model needs more."""
    max_error_frac: float = Field(0.5, gt=0, le=1)
    """Share of errors among the last answers (64 to 1024) above which the run ends: its reward is broken."""


class SourceConfig(Section):
    path: str = Field(min_length=1)
    """JSONL, Parquet or Arrow file, folder, or name of a dataset on the hub."""
    name: str = ""
    """Name in metrics and in ``problem.source``; "": the path's last part."""
    subset: str | None = None
    """Overrides ``data.subset``; null: no override."""
    split: str | None = None
    """Overrides ``data.split``; null: no override."""
    prompt_key: str | None = None
    """Overrides ``data.prompt_key``; null: no override."""
    answer_key: str | None = None
    """Overrides ``data.answer_key``; null: no override."""
    reward: str | list[PartConfig] | None = None
    """Overrides ``reward.function``; ``row:KEY``: the field KEY of a row names the built-in function. null: no
    override."""
    system: str | None = None
    """Overrides ``data.system``; null: no override."""
    suffix: str | None = None
    """Overrides ``data.suffix``; null: no override."""

    @property
    def shown(self) -> str:
        return self.name or self.path.rstrip("/").rpartition("/")[2]


class TrainSourceConfig(SourceConfig):
    weight: float | None = Field(None, gt=0)
    """Share of the prompts, relative to the other sources; null: the number of its problems."""


class EvalSetConfig(SourceConfig):
    max_prompts: int | None = Field(None, ge=1)
    """Problems used, from the top; null: all."""
    n: int = Field(1, ge=1)
    """Samples per problem."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus of the sampling."""
    max_response_tokens: int | None = Field(None, ge=1)
    """Response limit; null: ``rollout.max_response_tokens``."""


class DataConfig(Section):
    path: str = ""
    """JSONL, Parquet or Arrow file, folder, or name of a dataset on the hub; "" where ``sources`` lists several."""
    sources: list[TrainSourceConfig] = Field([])
    """Several sources, each a section of the keys below; unset keys hold as written here."""
    subset: str = ""
    """Configuration of a folder or hub dataset (``main`` of openai/gsm8k, for instance)."""
    split: str = "train"
    """Split of a folder or hub dataset."""
    prompt_key: str = "prompt"
    """Field of the problem: a text, or a list of messages. Dots go inside (``extra.question``)."""
    answer_key: str = "answer"
    """Field of the reference answer (``reward_model.ground_truth``, ``messages.-1.content``); "": there is none."""
    tools_key: str = ""
    """Field of the tools that the chat template shows; "": none."""
    chat_template: bool = False
    """Put messages, or the text as a message of the user, through the tokenizer's chat template."""
    template_options: dict[str, Any] = Field({})
    """Further arguments of the chat template (``enable_thinking: false``)."""
    system: str = ""
    """System message, where the messages have none."""
    prefix: str = ""
    """Text put before each problem (few-shot examples, for instance)."""
    suffix: str = ""
    """Text put after each problem (an instruction, for instance)."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Limit of a prompt."""
    overlong: Literal["refuse", "drop"] = "refuse"
    """Prompts beyond it are listed as an error, or left out."""
    max_bad_rows: int = Field(0, ge=0)
    """Rows that cannot be used: up to this many are skipped with a warning, more are an error that lists them."""
    difficulty: str = ""
    """Samples of an evaluation (``evaluations/*.arrow``) by which problems are chosen; "": none."""
    pass_rate: list[float] = Field([0.001, 0.999], min_length=2, max_length=2)
    """Lowest and highest share of right samples there; problems outside are left out, unknown ones stay."""

    def each(self) -> list[TrainSourceConfig]:
        """The sources to train on."""
        return list(self.by_key().values())

    def by_key(self) -> dict[str, TrainSourceConfig]:
        """The sources to train on, by the key of each one's path."""
        if self.path:
            return {"data.path": TrainSourceConfig(path=self.path)}
        return {f"data.sources[{i}].path": source for i, source in enumerate(self.sources)}

    def of(self, source: SourceConfig) -> Self:
        """These keys as they hold for ``source``."""
        own = source.model_dump(exclude_none=True)
        return self.model_copy(update={k: own[k] for k in own if k in type(self).model_fields})


class EvalConfig(Section):
    sets: list[EvalSetConfig] = Field([])
    """Sets to evaluate, each a section of the keys below; unset keys hold as in ``data``. []: no evaluation."""
    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: only before the first and after the last."""

    def by_key(self) -> dict[str, EvalSetConfig]:
        """The sets, by the key of each one's path."""
        return {f"eval.sets[{i}].path": held_out for i, held_out in enumerate(self.sets)}
