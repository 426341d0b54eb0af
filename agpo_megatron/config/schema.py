"""The whole configuration of a run as frozen pydantic models; every key is documented beside its default.

Cross-field checks live in ``checks.py``, presets in ``presets.py``, reading YAML in ``loading.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .presets import apply_preset


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class RunConfig(Section):
    dir: str = "runs/default"
    """Run folder. ``--run-dir`` overrides it. Other paths may refer to it as ``{run_dir}``."""
    checkpoint_every: int = Field(10, ge=1)
    """Optimizer steps between checkpoints. After a crash the steps since the last one are replayed."""
    keep_checkpoints: int = Field(2, ge=1)
    """Checkpoints kept; older ones, and the journal behind them if ``journal.keep`` says so, are removed."""


class ModelConfig(Section):
    path: str
    """Hugging Face checkpoint folder (safetensors, config, tokenizer) that training starts from."""


class DataConfig(Section):
    path: str
    """JSONL file of training problems."""
    prompt_key: str = "prompt"
    """Field that holds the problem text."""
    answer_key: str = "answer"
    """Field that holds the reference answer."""
    chat_template: bool = False
    """Wrap the problem as a user message with the tokenizer's chat template; otherwise the text is the prompt."""
    prefix: str = ""
    """Text put before each problem (few-shot examples, for instance)."""
    suffix: str = ""
    """Text put after each problem (an instruction, for instance)."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Longer prompts are refused at load time, with the line number."""


class SftConfig(Section):
    base: str
    """Hugging Face checkpoint the cold start begins from; the result is written to ``model.path``."""
    path: str
    """JSONL file with a ``prompt`` and a ``response`` field."""
    steps: int = Field(300, ge=1)
    """Optimizer steps at most."""
    batch_size: int = Field(64, ge=1)
    """Sequences per optimizer step."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate; it falls linearly to 0 at ``sft.steps``."""
    warmup_steps: int = Field(20, ge=0)
    """Steps of linear warm-up."""


class TrainConfig(Section):
    steps: int = Field(100, ge=0)
    """Optimizer steps of the run."""
    prompts_per_step: int = Field(16, ge=1)
    """Prompts (groups) per step."""
    lr: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay after warm-up, down to ``min_lr`` at ``steps``."""
    min_lr: float = Field(0.0, ge=0)
    """Floor of the decay."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW weight decay (not on norms and biases)."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """First moment decay."""
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    """Second moment decay."""
    adam_eps: float = Field(1e-8, gt=0)
    """AdamW epsilon."""
    grad_clip: float = Field(1.0, ge=0)
    """Global gradient norm limit; 0 turns it off."""
    micro_batch_tokens: int = Field(4096, ge=16)
    """Packing budget: tokens per micro-batch. A longer sequence is a micro-batch of its own."""


class RolloutConfig(Section):
    servers: int = Field(1, ge=1)
    """SGLang servers."""
    tensor_parallel: int = Field(1, ge=1)
    """Tensor parallel size of each server."""
    port: int = Field(0, ge=0, le=65535)
    """First server's port (then +1 per server); 0 picks free ports."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Server precision; ``auto`` follows ``policy.dtype``."""
    group_size: int = Field(8, ge=2)
    """Samples per prompt (G)."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; the policy's log-probs use the same."""
    max_response_tokens: int = Field(256, ge=1)
    """Response limit; longer ones are truncated."""
    stop: list[str] = []
    """Texts that end a response, besides EOS; the token that completes one belongs to the response."""
    max_in_flight: int = Field(64, ge=1)
    """Samples in flight per server."""
    mem_fraction: float = Field(0.8, gt=0, lt=1)
    """SGLang's --mem-fraction-static (GPU)."""
    max_total_tokens: int | None = Field(None, ge=256)
    """SGLang's KV pool in tokens; null leaves it to SGLang."""
    start_timeout: float = Field(300.0, gt=0)
    """Seconds for all nodes of a job to pass the preflight, and then for rollout servers to answer a real generate."""
    request_timeout: float = Field(600.0, gt=0)
    """Seconds for one generation request."""
    attempts: int = Field(3, ge=1)
    """Tries per group, on other servers where there are any, before the run ends."""


class Fp8Config(Section):
    recipe: Literal["none", "tensorwise", "delayed", "blockwise", "mxfp8"] = "none"
    """Transformer Engine FP8 recipe; needs Transformer Engine and a GPU that has it."""
    format: Literal["e4m3", "hybrid"] = "hybrid"
    """FP8 format: e4m3 everywhere, or e5m2 for gradients."""


class PolicyConfig(Section):
    tensor_parallel: int = Field(1, ge=1)
    """Tensor parallel size (TP)."""
    pipeline_parallel: int = Field(1, ge=1)
    """Pipeline stages (PP)."""
    virtual_pipeline: int = Field(1, ge=1)
    """Model chunks per stage (interleaved schedule) (VPP)."""
    context_parallel: int = Field(1, ge=1)
    """Context parallel size (CP)."""
    expert_parallel: int = Field(1, ge=1)
    """Expert parallel size (EP)."""
    data_parallel: int = Field(1, ge=1)
    """Replicas (DP). Ranks in all: TP x PP x CP x DP."""
    sequence_parallel: bool = False
    """Shard activations along the sequence between TP regions."""
    distributed_optimizer: bool = True
    """Shard the optimizer state over DP x CP."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Parameter and activation precision; optimizer state is fp32."""
    fp8: Fp8Config = Fp8Config()
    """FP8 matmuls."""
    layers: Literal["auto", "local"] = "auto"
    """``auto``: Transformer Engine's on a GPU, an error where it cannot be imported; ``local``: Megatron-Core's own, as
    on a CPU."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation."""
    logprob_chunk: int = Field(480, ge=1)
    """Rows of logits held at once: [chunk, V/TP], fp32. More is faster where matmuls outrun memory (a GPU)."""
    logprob_kernels: Literal["auto", "torch", "triton"] = "auto"
    """What treats logits between the matmuls; ``auto``: Triton on CUDA where it is installed."""

    @property
    def model_parallel(self) -> int:
        """Ranks of one replica."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel

    @property
    def world_size(self) -> int:
        return self.model_parallel * self.data_parallel


class LengthRewardConfig(Section):
    kind: Literal["none", "agpo", "kimi", "cosine", "dapo_overlong"] = "none"
    """Length term of the reward, training only: ``agpo`` is eq. A2; docs/algorithm.md, section 2, has the others."""
    weight: float = Field(0.1, ge=0)
    """Its scale (lambda of eq. A2)."""
    groups: Literal["mixed", "all"] = "mixed"
    """``agpo``: pay in groups with right and wrong answers only, or also where all are right."""
    tie: Literal["zero", "full"] = "zero"
    """``agpo``: what right answers of one length (a single one, for instance) earn: 0 or ``weight``."""
    buffer: int | None = Field(None, ge=1)
    """``dapo_overlong``: tokens below ``rollout.max_response_tokens`` over which the penalty grows; null: a fifth."""


class AdvantageConfig(Section):
    estimator: Literal[
        "group_norm", "group_center", "rloo", "reinforce_pp", "reinforce_pp_baseline", "batch_norm"
    ] = "group_norm"
    """How rewards become advantages (docs/algorithm.md, section 1)."""
    zero_variance: Literal["zero", "constant", "resample"] = "zero"
    """Groups whose raw rewards are all equal: advantage 0; +1 (all right) / -1 (all wrong) (AGPO v1, eq. A1); or
    replaced by groups of further prompts (DAPO's dynamic sampling)."""
    zero_variance_tol: float = Field(1e-6, ge=0)
    """A group has zero variance when max - min of its raw rewards is at most this."""
    std_eps: float = Field(1e-6, gt=0)
    """Added to the standard deviation (ddof 1)."""
    resample_rounds: int = Field(10, ge=1)
    """``resample``: rounds of generation per step at most; then zero-variance groups fill the step."""


class LossMaskConfig(Section):
    zero_variance: bool = False
    """Drop zero-variance groups from the loss (AGPO v3, eq. A3)."""
    criterion: Literal["group", "sample"] = "group"
    """Drop whole groups by their raw rewards, or single samples with advantage 0 (the authors' code)."""
    truncated: bool = False
    """Drop truncated responses from the loss (DAPO's overlong filtering)."""
    denominators: Literal["exclude", "keep"] = "exclude"
    """What is dropped leaves the denominators too, or still dilutes the rest."""


class LossClipConfig(Section):
    kind: Literal["none", "max0", "exp", "elu", "softplus"] = "none"
    """Function on the policy loss: ``max0`` is AGPO v3's lower bound (eq. A4), the others eq. 1d."""
    min: float = 0.0
    """The bound of ``max0``."""
    tau: float = Field(1.0, gt=0)
    """Scale of ``exp``, ``elu`` and ``softplus``."""
    scope: Literal["batch", "micro_batch", "group", "sequence", "token"] = "batch"
    """What the function is applied to: the loss of the whole optimizer step, or each part by itself (eq. 1e)."""
    on: Literal["policy", "total"] = "policy"
    """The policy loss alone, or with KL and entropy terms."""
    tie: Literal["zero", "half", "full"] = "zero"
    """Gradient of ``max0`` exactly at the bound."""
    when_clipped: Literal["step", "skip_step"] = "step"
    """A closed gate gives a zero gradient: let the optimizer step on it (momentum still moves), or skip the step."""


class KlConfig(Section):
    coef: float = Field(0.0, ge=0)
    """Weight of the KL term against the initial policy (``model.path``); 0 turns it off."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """d, d^2 / 2, or e^-d + d - 1 of the log-ratio d."""
    place: Literal["loss", "reward"] = "loss"
    """A term of the loss, or subtracted from the reward of each response (summed over its tokens)."""
    importance: bool = False
    """In the loss: multiply by the policy's ratio, which makes the gradient unbiased."""


class EntropyConfig(Section):
    coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus; with ``target`` its first value."""
    target: float | None = Field(None, gt=0)
    """Entropy (nats) below which the bonus acts, with a coefficient that adapts; null keeps ``coef`` fixed."""
    delta: float = Field(0.005, gt=0)
    """Step of the adaptive coefficient."""


class CorrectionConfig(Section):
    kind: Literal["none", "tis", "mis", "icepop"] = "none"
    """Weights for the gap between server and trainer: truncated at ``high``, or 0 outside [``low``, ``high``]."""
    level: Literal["token", "sequence", "sequence_mean"] = "token"
    """Ratio of a token, of the sequence (product), or its geometric mean."""
    low: float = Field(0.5, ge=0)
    """Lower bound (``mis``, ``icepop``)."""
    high: float = Field(2.0, gt=0)
    """Upper bound."""
    denominators: Literal["exclude", "keep"] = "keep"
    """Tokens of weight 0 leave the denominators too, or still dilute the rest."""


class LossConfig(Section):
    policy: Literal["ppo", "gspo", "gspo_token", "cispo", "gmpo", "sapo"] = "ppo"
    """Policy loss of a token (docs/algorithm.md, section 3)."""
    old_logprobs: Literal["policy", "rollout"] = "policy"
    """What the ratio starts from: the trainer's own weights before the step, or the server's log-probs."""
    clip_low: float = Field(0.2, gt=0, le=1)
    """Ratio clip below 1 (epsilon low)."""
    clip_high: float = Field(0.28, gt=0)
    """Ratio clip above 1 (epsilon high)."""
    dual_clip: float | None = Field(None, gt=1)
    """``ppo``: bound of the ratio for negative advantages; null turns it off."""
    aggregation: Literal[
        "token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"
    ] = "token_mean"
    """How token losses become one number (docs/algorithm.md, section 4)."""
    norm_length: int | None = Field(None, ge=1)
    """Constant length of ``seq_mean_token_sum_norm``; null: ``rollout.max_response_tokens``."""
    mask: LossMaskConfig = LossMaskConfig()
    """Loss mask."""
    clip: LossClipConfig = LossClipConfig()
    """Adaptive part: loss clip or exponential normalisation."""
    kl: KlConfig = KlConfig()
    """KL to the initial policy."""
    entropy: EntropyConfig = EntropyConfig()
    """Entropy bonus."""
    correction: CorrectionConfig = CorrectionConfig()
    """Rollout correction."""


class AlgorithmConfig(Section):
    preset: Literal[
        "agpo",
        "agpo_v1",
        "agpo_v3",
        "agpo_v3_authors",
        "agpo_exp",
        "grpo",
        "dr_grpo",
        "dapo",
        "gspo",
        "cispo",
        "rloo",
        "reinforce_pp",
        "gmpo",
        "sapo",
    ] = "agpo"
    """Sets the switches below; a key written beside it wins. The resolved config shows every value."""
    length_reward: LengthRewardConfig = LengthRewardConfig()
    """Length term of the reward."""
    advantage: AdvantageConfig = AdvantageConfig()
    """Advantages."""
    loss: LossConfig = LossConfig()
    """Policy loss."""

    @model_validator(mode="before")
    @classmethod
    def _complete_from_preset(cls, section: Any) -> Any:
        return apply_preset(section) if isinstance(section, Mapping) else section


class RewardConfig(Section):
    verifier: Literal["numeric"] = "numeric"
    """``numeric``: exact match of the last \\boxed{}, #### or number."""
    correct: float = 1.0
    """Reward of a right answer."""
    wrong: float = 0.0
    """Reward of a wrong answer."""
    timeout: float = Field(10.0, gt=0)
    """Seconds per answer; then it scores ``wrong``, and the journal says why (``reward_error``)."""


class EvalConfig(Section):
    path: str = ""
    """JSONL file of held-out problems; "" turns evaluation off."""
    max_prompts: int = Field(200, ge=1)
    """Problems used, from the top of the file."""
    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: only before the first and after the last."""


class JournalConfig(Section):
    keep: Literal["all", "checkpoints"] = "all"
    """``checkpoints`` prunes what lies behind the retained checkpoints."""


class ClusterConfig(Section):
    trainer_nodes: int = Field(1, ge=1)
    """Nodes for the trainers."""
    rollout_nodes: int = Field(1, ge=0)
    """Nodes for the rollout servers; 0 puts them on the trainers' nodes, on the devices behind the ranks'."""
    gpus_per_node: int = Field(8, ge=1)
    """Accelerators per node."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: CUDA where there is one."""
    publish_backend: Literal["auto", "gloo"] = "auto"
    """What carries weights to servers. ``auto``: NCCL on a GPU, gloo on a CPU. ``gloo``: through host memory, where
    trainers and servers share a GPU, which NCCL refuses."""
    heartbeat_timeout: float = Field(120.0, gt=0)
    """Seconds without a rank's heartbeat after which it counts as lost."""
    command_timeout: float = Field(1800.0, gt=0)
    """Seconds for one trainer command (load, score, update, publish, save)."""
    attempts: int = Field(3, ge=1)
    """Starts in a row that may fail without a step committed in between; then a Slurm job is not requeued again."""


class PrepareConfig(Section):
    recipe: Literal["none", "tiny_sums", "smollm2_sums", "smollm2_gsm8k"] = "none"
    """What ``agpo-megatron prepare`` writes before a demonstration run (data, base checkpoint)."""
    source: str = ""
    """Input of the recipe, where it needs one (a GSM8K folder, for instance)."""
    train_problems: int = Field(4000, ge=1)
    """Problems generated for training."""
    sft_examples: int = Field(20000, ge=1)
    """Worked solutions generated for the cold start."""
    eval_problems: int = Field(200, ge=1)
    """Held-out problems generated."""


class Config(Section):
    seed: int = Field(1, ge=0)
    """Seed of everything random that this project draws: task, shuffle, initial weights."""
    run: RunConfig = RunConfig()
    """Run folder and checkpoints."""
    model: ModelConfig
    """The policy's weights and tokenizer."""
    data: DataConfig
    """Training problems."""
    sft: SftConfig | None = None
    """Cold start by supervised fine-tuning; leave the section out to start from ``model.path`` as it is."""
    train: TrainConfig = TrainConfig()
    """Reinforcement learning: steps, batch, optimizer."""
    rollout: RolloutConfig = RolloutConfig()
    """SGLang servers and sampling."""
    policy: PolicyConfig = PolicyConfig()
    """Megatron-Core policy: parallel layout and precision."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """AGPO and its parts."""
    reward: RewardConfig = RewardConfig()
    """Verifier and what an answer is worth."""
    eval: EvalConfig = EvalConfig()
    """Held-out evaluation (greedy), before and after training."""
    journal: JournalConfig = JournalConfig()
    """Durable record of samples and steps."""
    cluster: ClusterConfig = ClusterConfig()
    """Nodes, device and deadlines."""
    prepare: PrepareConfig = PrepareConfig()
    """Demonstration data and models."""
