"""The schema of pretraining and of every config group: typed dataclasses, checked before anything starts.

`configs/*.yaml` fill these in; Hydra refuses a key or a type that is not here, and the `validate` of a recipe's schema
refuses combinations that cannot run. Groups: `model`, `data`, `optim`, `schedule`, `parallel`, `track`, `kernel`.
"""

from dataclasses import dataclass, field

from omegaconf import MISSING

from qlatrain.checks import check_values, nearest, value_at

LAYER_KINDS = ("gdn", "attn")
LORA_TARGETS = ("attention", "gdn", "mlp")
FAMILIES = ("qwen3_5_text", "qwen3_5", "olmo_hybrid")  # what is read and written, by transformers' model types
WEIGHT_DTYPES = ("float32", "bfloat16")


@dataclass
class RunConfig:
    """Where a run lives."""

    name: str = "pretrain"
    dir: str = "runs/${run.name}"


@dataclass
class ModelConfig:
    """A hybrid decoder. Field names are those of transformers' `Qwen3_5TextConfig` where it has them."""

    name: str = MISSING
    architecture: str = "qwen3_5"  # qwen3_5 | olmo_hybrid
    vocab_size: int = MISSING
    hidden_size: int = MISSING
    intermediate_size: int = MISSING
    num_hidden_layers: int = MISSING
    layer_pattern: list[str] = field(default_factory=lambda: ["gdn", "gdn", "gdn", "attn"])  # repeated to the depth
    # full attention
    num_attention_heads: int = MISSING
    num_key_value_heads: int = MISSING
    head_dim: int = MISSING
    partial_rotary_factor: float = 0.25
    rope_theta: float | None = 10_000_000.0  # null: no positions, for olmo_hybrid
    attention_bias: bool = False
    # Gated DeltaNet
    linear_num_key_heads: int = MISSING
    linear_num_value_heads: int = MISSING
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_conv_kernel_dim: int = 4
    allow_neg_eigval: bool = False
    # shared
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 32768

    @property
    def layer_kinds(self) -> list[str]:
        """The mixer of every layer, from the first to the last: `layer_pattern` repeated to the depth."""
        pattern = list(self.layer_pattern)
        return [pattern[i % len(pattern)] for i in range(self.num_hidden_layers)]


@dataclass
class DataConfig:
    """Documents, how they become tokens, and how tokens become rows."""

    name: str = MISSING
    source: str = "stdlib"  # stdlib | text | hf
    files: list[str] = field(default_factory=list)  # text: paths or globs of .txt, .jsonl, .parquet
    dataset: str | None = None  # hf: a `datasets` dataset, by name or local folder
    dataset_config: str | None = None
    split: str = "train"
    streaming: bool = False
    format: str = "text"  # text | conversations (rows of .jsonl, .parquet or hf; the assistant's turns are the targets)
    text_key: str = "text"  # the field of .jsonl, .parquet and hf rows that holds the document
    messages_key: str = "messages"  # conversations: the field that holds the list of {role, content}
    tokenizer: str = "bytes"  # bytes, or any Hugging Face tokenizer by path or name
    chat_template: str | None = None  # in place of the tokenizer's own: a file, or bos_eos or chatml
    sequence_length: int = 512  # tokens a row
    validation_fraction: float = 0.05  # of the documents
    shuffle: bool = True
    shuffle_block: int = 10_000  # streaming: documents shuffled together
    interleave: int = 64  # text: documents open side by side, which give rows in turn
    lookahead: int = 256  # conversations: those that the rest of a row is filled from
    too_long: str = "cut"  # cut | drop | error: what becomes of a conversation longer than a row
    workers: int = 2  # threads that read and tokenise ahead; 0 reads in step with training


@dataclass
class OptimConfig:
    """AdamW for everything, or Muon for the matrices inside the blocks and AdamW for the rest."""

    name: str = "adamw"  # adamw | muon
    lr: float = 1e-3  # peak rate of AdamW
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1  # not on norms, biases, A_log, dt_bias and convolutions
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    muon_weight_decay: float = 0.0


@dataclass
class ScheduleConfig:
    """The factor on the peak rate: a linear warm-up, then a shape over the remaining steps."""

    name: str = "cosine"  # cosine | wsd
    warmup_steps: int = 20
    final: float = 0.1  # of the peak rate, at the last step
    decay_fraction: float = 0.2  # wsd: the part of the run, at its end, over which the rate falls


@dataclass
class ParallelConfig:
    """How the model is laid over devices."""

    layout: str = "data"  # single (one process) | data (a replica on each process)


@dataclass
class TrackConfig:
    """What is reported where. `metrics.jsonl` and `loss.png` are always written."""

    backend: str | None = None  # wandb
    project: str = "qlatrain"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)
    log_every: int = 1  # steps between progress lines and metric rows


@dataclass
class KernelConfig:
    """Which implementation each operator runs; `auto` takes the fastest that can run here and says why."""

    gated_delta_rule: str = "auto"  # auto | tilelang | flash_qla | fla | torch


@dataclass
class StepConfig:
    """How a step is taken, whatever it is taken for."""

    mixed_precision: str = "no"  # no | bf16
    max_grad_norm: float = 1.0
    compile: bool = False  # torch.compile each block
    activation_checkpointing: bool = False  # keep only block inputs, recompute the rest in the backward
    recompute_mlp: bool = False  # keep inputs of MLPs, not their first products: 4 F - 2 D bytes a token and layer less
    recompute_convolution: bool = False  # keep no convolved queries and keys: 4 Hk K bytes a token and GDN layer less
    gradient_dtype: str = "float32"  # of the blocks' matrices: float32 | bfloat16, rounded as autocast does

    def described(self) -> str:
        """`mixed precision bf16, compiled, …`: what a step's speed and memory depend on."""
        said = [f"mixed precision {self.mixed_precision}", "compiled" if self.compile else "eager"]
        said += ["activation checkpointing"] * self.activation_checkpointing
        said += ["MLPs recomputed"] * self.recompute_mlp
        said += ["convolutions recomputed"] * self.recompute_convolution
        said += [f"gradients of matrices in {self.gradient_dtype}"] * (self.gradient_dtype != "float32")
        return ", ".join(said)


@dataclass
class TrainConfig(StepConfig):
    steps: int = MISSING
    seed: int = 0
    global_batch_size: int = 16  # rows an optimizer step takes, over all processes
    micro_batch_size: int = 16  # rows a process takes through the model at once
    max_skipped_steps: int = 10  # non-finite gradients this many steps in a row end the run


@dataclass
class CheckpointConfig:
    every: int = 100  # steps
    keep: int = 2  # newest complete checkpoints kept


@dataclass
class ValidationConfig:
    every: int = 100  # steps; 0: only at the end
    rows: int = 64  # rows of held-out documents; all of them when there are fewer


@dataclass
class MetricsConfig:
    """What a run measures of itself beside loss and speed."""

    kernel_times_every: int = 0  # steps between profiles of a step: its time by family of kernels; 0: none


@dataclass
class SampleConfig:
    """Text the trained model writes at the end of a run."""

    prompts: list[str] = field(default_factory=lambda: ["def ", "import ", "class "])
    tokens: int = 200
    temperature: float = 0.8


@dataclass
class TrainingConfig:
    """What every training recipe is told."""

    recipe: str = MISSING
    resume: str = "auto"  # auto | never | path of a checkpoint
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    kernel: KernelConfig = field(default_factory=KernelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)


@dataclass
class PretrainConfig(TrainingConfig):
    recipe: str = "pretrain"
    model: ModelConfig = field(default_factory=ModelConfig)

    def validate(self) -> None:
        """Raises ValueError, one sentence naming the key, for values and combinations that cannot run."""
        check_values(self, CHOICES, AT_LEAST)
        validate_model(self.model)
        _validate_training(self)
        _validate_data(self.data)


@dataclass
class InitConfig:
    """What finetuning begins with."""

    checkpoint: str = MISSING  # folder of a Hugging Face checkpoint
    dtype: str = "float32"  # float32 | bfloat16: of the weights; those that are trained should be float32


@dataclass
class LoraConfig:
    """Low-rank updates in place of full finetuning (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = 0  # 0: every weight is trained
    alpha: float = 32.0  # updates are scaled by alpha / rank
    dropout: float = 0.0  # of what goes into the updates
    targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS))  # whose projections: attention, gdn, mlp


@dataclass
class FinetuneConfig(TrainingConfig):
    recipe: str = "finetune"
    init: InitConfig = field(default_factory=InitConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def validate(self) -> None:
        """As of `PretrainConfig`."""
        check_values(self, _without_model(CHOICES) | _OF_FINETUNING, _without_model(AT_LEAST) | _LEAST_OF_FINETUNING)
        _validate_training(self)
        _validate_data(self.data)
        _validate_lora(self)


@dataclass
class ExportConfig:
    recipe: str = "export"
    run: str = MISSING  # folder of a run
    format: str | None = None  # the family to write; null: that of the run's model
    out: str = "${run}/export"  # folder to write
    checkpoint: str = "newest"  # of the run; or the path of one
    dtype: str | None = None  # float32 | bfloat16; null: as the run holds them
    merge: bool = True  # LoRA: add the updates to the weights; false writes the adapter alone

    def validate(self) -> None:
        """As of `PretrainConfig`."""
        check_values(self, {"format": (None, *FAMILIES), "dtype": (None, *WEIGHT_DTYPES)}, {})


CHOICES = {
    "model.architecture": ("qwen3_5", "olmo_hybrid"),
    "data.source": ("stdlib", "text", "hf"),
    "data.format": ("text", "conversations"),
    "data.too_long": ("cut", "drop", "error"),
    "optim.name": ("adamw", "muon"),
    "schedule.name": ("cosine", "wsd"),
    "parallel.layout": ("single", "data"),
    "track.backend": (None, "wandb"),
    "kernel.gated_delta_rule": ("auto", "tilelang", "flash_qla", "fla", "torch"),
    "train.mixed_precision": ("no", "bf16"),
    "train.gradient_dtype": ("float32", "bfloat16"),
}
AT_LEAST = {
    "train.steps": 1,
    "train.global_batch_size": 1,
    "train.micro_batch_size": 1,
    "train.max_skipped_steps": 1,
    "data.sequence_length": 2,
    "data.interleave": 1,
    "data.lookahead": 1,
    "data.workers": 0,
    "model.vocab_size": 1,
    "model.hidden_size": 1,
    "model.intermediate_size": 1,
    "model.num_hidden_layers": 1,
    "model.num_attention_heads": 1,
    "model.num_key_value_heads": 1,
    "model.linear_num_key_heads": 1,
    "model.linear_num_value_heads": 1,
    "model.linear_key_head_dim": 1,
    "model.linear_value_head_dim": 1,
    "model.linear_conv_kernel_dim": 1,
    "schedule.warmup_steps": 0,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "validation.every": 0,
    "validation.rows": 1,
    "metrics.kernel_times_every": 0,
    "track.log_every": 1,
    "sample.tokens": 0,
    "sample.temperature": 0,
    "optim.lr": 0,
    "optim.muon_lr": 0,
}
_OF_FINETUNING = {"init.dtype": WEIGHT_DTYPES}
_LEAST_OF_FINETUNING = {"lora.rank": 0, "lora.dropout": 0}


def _without_model(rules: dict) -> dict:
    return {key: rule for key, rule in rules.items() if not key.startswith("model.")}


def _validate_training(config: TrainingConfig) -> None:
    train = config.train
    if train.global_batch_size % train.micro_batch_size:
        raise ValueError(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size={train.micro_batch_size}: change one of them"
        )
    if config.schedule.warmup_steps >= train.steps:
        raise ValueError(
            f"schedule.warmup_steps={config.schedule.warmup_steps} leaves nothing of train.steps={train.steps}: "
            "make it smaller"
        )
    if train.gradient_dtype != "float32" and train.micro_batch_size < train.global_batch_size:
        raise ValueError(
            f"train.gradient_dtype={train.gradient_dtype} would add up micro-batches in half precision: use "
            f"float32, or train.micro_batch_size={train.global_batch_size}, as train.global_batch_size"
        )
    for key in ("schedule.final", "schedule.decay_fraction"):
        if not 0 <= value_at(config, key) <= 1:
            raise ValueError(f"{key}={value_at(config, key)} is not between 0 and 1")
    validate_step(train)


def validate_step(train: StepConfig) -> None:
    """Raises ValueError, one sentence naming the key."""
    if train.max_grad_norm <= 0:
        raise ValueError(f"train.max_grad_norm={train.max_grad_norm} is not above 0; use inf not to clip")
    if train.gradient_dtype != "float32" and train.mixed_precision != "bf16":
        raise ValueError(
            f"train.gradient_dtype={train.gradient_dtype} needs train.mixed_precision=bf16, not {train.mixed_precision}"
        )


def _validate_lora(config: FinetuneConfig) -> None:
    lora = config.lora
    if lora.rank and not lora.targets:
        raise ValueError(f"lora.targets is empty: give a list of {', '.join(LORA_TARGETS)}")
    for target in lora.targets:
        if target not in LORA_TARGETS:
            raise ValueError(
                f"lora.targets holds {target}, which is not one of {', '.join(LORA_TARGETS)}"
                f"{nearest(target, LORA_TARGETS)}"
            )
    if lora.dropout >= 1:
        raise ValueError(f"lora.dropout={lora.dropout} leaves nothing: it is a fraction below 1")
    if lora.rank and lora.alpha <= 0:
        raise ValueError(f"lora.alpha={lora.alpha} is not above 0")


def _validate_data(data: DataConfig) -> None:
    if not 0 < data.validation_fraction < 1:
        raise ValueError(
            f"data.validation_fraction={data.validation_fraction} is not between 0 and 1: it is the part of the "
            "documents that is held out"
        )
    if data.source == "text" and not data.files:
        raise ValueError("data.source=text needs data.files: a list of paths or globs of .txt, .jsonl or .parquet")
    if data.source == "hf" and not data.dataset:
        raise ValueError("data.source=hf needs data.dataset: the name or the folder of a dataset")
    if data.format == "conversations" and data.source == "stdlib":
        raise ValueError("data.format=conversations needs data.source=text or hf: the standard library holds none")
    if data.streaming and data.source != "hf":
        raise ValueError(f"data.streaming=true needs data.source=hf, not {data.source}")


def validate_model(model: ModelConfig) -> None:
    """Raises ValueError, one sentence naming the key, for sizes that do not fit together."""
    if not model.layer_pattern:
        raise ValueError("model.layer_pattern is empty: give a list of gdn and attn")
    for kind in model.layer_pattern:
        if kind not in LAYER_KINDS:
            raise ValueError(
                f"model.layer_pattern holds {kind}, which is not one of {', '.join(LAYER_KINDS)}"
                f"{nearest(kind, LAYER_KINDS)}"
            )
    for heads, groups in (
        ("linear_num_value_heads", "linear_num_key_heads"),
        ("num_attention_heads", "num_key_value_heads"),
    ):
        if getattr(model, heads) % getattr(model, groups):
            raise ValueError(
                f"model.{heads}={getattr(model, heads)} is not a multiple of model.{groups}={getattr(model, groups)}"
            )
    if model.architecture == "olmo_hybrid":
        _validate_olmo_hybrid(model)
    elif model.rope_theta is None:
        raise ValueError("model.rope_theta=null, no positions, needs model.architecture=olmo_hybrid")
    rotated = model.head_dim * model.partial_rotary_factor
    if not 0 < model.partial_rotary_factor <= 1 or rotated != int(rotated) or int(rotated) % 2:
        raise ValueError(
            f"model.partial_rotary_factor={model.partial_rotary_factor} rotates {rotated:g} of "
            f"model.head_dim={model.head_dim} dimensions: it must be an even number of them"
        )


def _validate_olmo_hybrid(model: ModelConfig) -> None:
    """What transformers' `OlmoHybridConfig` cannot hold would make a checkpoint that nothing opens."""
    if set(model.layer_kinds) != set(LAYER_KINDS):
        raise ValueError("model.architecture=olmo_hybrid needs layers of both kinds, gdn and attn")
    if model.partial_rotary_factor != 1:
        raise ValueError(
            f"model.partial_rotary_factor={model.partial_rotary_factor} is not 1: olmo_hybrid turns heads as a whole"
        )
