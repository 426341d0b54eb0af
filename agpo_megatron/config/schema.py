"""The whole configuration of a run as frozen pydantic models; every key is documented beside its default.

The algorithm's own sections are ``algorithm/settings.py``, those of data, reward and evaluation ``task.py``.
Cross-field checks live in ``checks.py``, reading YAML in ``loading.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from agpo_megatron.algorithm.presets import correct_staleness
from agpo_megatron.algorithm.settings import AlgorithmSettings, Section

from .task import DataConfig, EvalConfig, RewardConfig


class RunConfig(Section):
    dir: str = "runs/default"
    """Run folder. ``--run-dir`` overrides it. Other paths may refer to it as ``{run_dir}``."""
    checkpoint_every: int = Field(10, ge=1)
    """Optimizer steps between checkpoints. After a crash the steps since the last one are replayed."""
    checkpoint_minutes: float = Field(0.0, ge=0)
    """Also a checkpoint after the first step that ends so many minutes after the last was begun; 0: by steps only."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints kept; older ones, and the journal behind them if ``journal.keep`` says so, are removed."""
    keep_best: str = ""
    """One more checkpoint is kept: the best by this metric of its step (docs/metrics.md), or by ``eval/SCORE`` (of the
    first set) or ``eval/SET/SCORE`` of its evaluation. A leading ``-``: the least is the best. Empty: none."""
    async_save: bool = True
    """Training goes on while a checkpoint's files are written, from a copy of each rank's share in host memory. Off:
    for hosts without that memory."""
    export_every: int = Field(0, ge=0)
    """Optimizer steps between exports in Hugging Face format to ``exports/step-N`` of the run folder; 0: only at the
    end, to ``hf``. They are never removed."""


class ModelConfig(Section):
    path: str
    """Folder of the model that training starts from: of Hugging Face (safetensors, config, tokenizer), or written by
    ``tools/convert_hf_checkpoint.py to-megatron``, in any layout."""


class SftConfig(Section):
    base: str
    """Folder of the model the cold start begins from, of either kind; the result is written to ``model.path``, of
    Hugging Face."""
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
    prompts_per_batch: int = Field(16, ge=1)
    """Prompts (groups) per batch."""
    updates_per_batch: int = Field(1, ge=1)
    """Optimizer steps on each batch, each on its share of the groups; weights are published after the last of them."""
    max_staleness: int = Field(0, ge=0)
    """Batches by which generation may run ahead of training: a response may be trained on when weights have been
    published this often since it was begun. 0: generation and training take turns."""
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


class GuardsConfig(Section):
    actions: list[Literal["warn", "skip", "roll_back", "stop"]] = Field(
        ["warn", "skip", "roll_back", "stop"], min_length=1
    )
    """Done in the first, second, ... step within 50 in which a guard fires; the last entry holds for all further ones.
    A loss or gradient that is not finite is never stepped on: it begins behind ``warn``."""
    grad_norm: float | None = Field(50.0, gt=1)
    """Gradient norm, as a multiple of the median of the last 64 (8 at least), above which it fires; null: never."""
    logprob_gap: float | None = Field(1.0, ge=0)
    """Mean of ``|log-prob of server - of trainer|`` over trained tokens, in nats, above which it fires; null: never."""
    logprob_far: float | None = Field(0.2, ge=0, le=1)
    """Share of trained tokens where they are more than 1 nat apart, above which it fires; null: never."""
    entropy: float | None = Field(0.001, gt=0)
    """Entropy, mean over trained tokens, in nats, below which it fires; null: never."""
    reward_drop: float | None = Field(0.9, gt=0)
    """Fall of the mean reward of 8 batches below the best median of 8 batches, as a share of the largest absolute one,
    above which it fires if it is also more than chance (4 standard errors); null: never."""
    truncated: float | None = Field(0.95, ge=0, le=1)
    """Share of truncated responses above which it fires, once a batch had no more; null: never."""


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
    fragment_tokens: int = Field(2048, ge=1)
    """Tokens of one generation request at most; longer responses are continued by further requests. What a lost
    server or a killed controller costs of a response."""
    kv_on_publish: Literal["recompute", "keep"] = "recompute"
    """Responses that run while new weights arrive: continued on a cache computed anew with the new weights, or kept
    running on the old one, which was never executed on a GPU (docs/async.md)."""
    stop: list[str] = Field([])
    """Texts that end a response, besides EOS; the token that completes one belongs to the response."""
    max_in_flight: int = Field(64, ge=1)
    """Samples in flight per server."""
    server_args: dict[str, Any] = Field({})
    """Further flags of SGLang by its own names, with underscores (``mem_fraction_static``, 0.8 unless given;
    ``max_total_tokens``; ``chunked_prefill_size``). Flags that the project sets are refused, with the key to use.
    ``enable_deterministic_inference: true``: samples depend on weights, prompt and seed alone (docs/design.md)."""
    start_timeout: float = Field(300.0, gt=0)
    """Seconds for all nodes of a job to pass the preflight, and then for rollout servers to answer a real generate."""
    request_timeout: float = Field(600.0, gt=0)
    """Seconds for one generation request (a fragment, see ``fragment_tokens``)."""
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
    """Kernels for the logits between the matmuls; ``auto``: Triton on CUDA where it is installed."""
    megatron: dict[str, Any] = Field({})
    """Further fields of Megatron-Core's TransformerConfig by its own names (``recompute_modules``,
    ``fp32_residual_connection``). Fields that the project sets are refused, with the key to use."""

    @property
    def model_parallel(self) -> int:
        """Ranks of one replica."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel

    @property
    def world_size(self) -> int:
        return self.model_parallel * self.data_parallel


class JournalConfig(Section):
    keep: Literal["all", "checkpoints"] = "all"
    """``checkpoints`` prunes what lies behind the retained checkpoints."""


class ObserveConfig(Section):
    writers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(["tensorboard"])
    """Writers of metrics beside ``metrics.jsonl``; ``wandb`` and ``mlflow`` need their package and obey its variables
    (``WANDB_MODE=offline``, ``MLFLOW_TRACKING_URI``)."""
    prometheus_port: int = Field(0, ge=0, le=65535)
    """Port on the controller's node at which Prometheus finds the run (``/metrics``), readable by all who reach it; 0:
    none."""
    peak_tflops: float | None = Field(None, gt=0)
    """Peak of a trainer's device in the precision of the run, TFLOP/s (H100, dense bf16: 989); null: no MFU."""


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
    """Backend that carries weights to servers. ``auto``: NCCL on a GPU, gloo on a CPU. ``gloo``: through host memory,
    where trainers and servers share a GPU, which NCCL refuses."""
    heartbeat_timeout: float = Field(120.0, gt=0)
    """Seconds without a rank's heartbeat after which it counts as lost."""
    command_timeout: float = Field(1800.0, gt=0)
    """Seconds for one trainer command (load, score, update, publish, save)."""
    attempts: int = Field(3, ge=1)
    """Starts in a row that may fail without a step committed in between; then a Slurm job is not requeued again."""


class PrepareConfig(Section):
    recipe: Literal[
        "none",
        "tiny_sums",
        "tiny_sums_neutral",
        "tiny_sums_needed",
        "tiny_sums_overthinking",
        "smollm2_sums",
        "smollm2_gsm8k",
    ] = "none"
    """Files that ``agpo-megatron prepare`` writes before a demonstration run (data, base checkpoint)."""
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
    guards: GuardsConfig = GuardsConfig()
    """Limits of a step's numbers, wide of healthy runs, and what is done beyond them (docs/troubleshooting.md)."""
    rollout: RolloutConfig = RolloutConfig()
    """SGLang servers and sampling."""
    policy: PolicyConfig = PolicyConfig()
    """Megatron-Core policy: parallel layout and precision."""
    algorithm: AlgorithmSettings = AlgorithmSettings()
    """AGPO and its parts."""
    reward: RewardConfig = RewardConfig()
    """Reward functions, and the processes they run in (docs/rewards.md)."""
    eval: EvalConfig = EvalConfig()
    """Evaluation, before and after training and on schedule."""
    journal: JournalConfig = JournalConfig()
    """Durable record of samples and steps."""
    observe: ObserveConfig = ObserveConfig()
    """Writers of metrics, and Prometheus (docs/metrics.md)."""
    cluster: ClusterConfig = ClusterConfig()
    """Nodes, device and deadlines."""
    prepare: PrepareConfig = PrepareConfig()
    """Demonstration data and models."""

    @model_validator(mode="before")
    @classmethod
    def _correct_staleness(cls, config: Any) -> Any:
        return correct_staleness(config) if isinstance(config, Mapping) else config
