"""A run seen from outside: its config, a checkpoint, the model in it, and a card that tells how it came to be."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file

from qlatrain.config import DataConfig, FinetuneConfig, PretrainConfig
from qlatrain.metrics.recorder import read_metrics
from qlatrain.models import HybridForCausalLM, from_pretrained
from qlatrain.models.hf_config import read_config
from qlatrain.models.huggingface import load_weights
from qlatrain.models.lora import add_lora
from qlatrain.training.checkpoints import find_checkpoint, read_state

SCHEMAS = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}


def dtype_named(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


@dataclass(frozen=True)
class FinishedRun:
    """A run directory and one of its checkpoints; the run need not have come to its end."""

    folder: Path
    config: PretrainConfig | FinetuneConfig
    checkpoint: Path
    state: dict  # the checkpoint's

    @classmethod
    def read(cls, folder: Path, checkpoint: str) -> "FinishedRun":
        """checkpoint: `newest`, or the path of one.

        Raises:
            ValueError: not a training run, or without a checkpoint.
            CheckpointError: the checkpoint is truncated.
        """
        try:
            held = OmegaConf.load(folder / "config.yaml")
            schema = SCHEMAS.get(held.get("recipe"))
        except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
            raise ValueError(
                f"run={folder} is not the folder of a run: its config.yaml cannot be read ({error})"
            ) from error
        if schema is None:
            raise ValueError(f"run={folder} is of recipe {held.get('recipe')!r}: export takes pretrain and finetune")
        found = find_checkpoint(folder, "auto" if checkpoint == "newest" else checkpoint)
        if found is None:
            raise ValueError(f"run={folder} has no complete checkpoint yet: let it come to its first one")
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), held))
        return cls(folder, config, found, read_state(found))

    @property
    def base(self) -> Path | None:
        """The checkpoint that a finetuning run began with."""
        return Path(self.config.init.checkpoint) if isinstance(self.config, FinetuneConfig) else None

    @property
    def data(self) -> DataConfig:
        return self.config.data

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def family(self) -> str:
        """transformers' model type of what the run began with."""
        if self.base is not None:
            return read_config(self.base)["model_type"]
        return {"qwen3_5": "qwen3_5_text"}.get(self.config.model.architecture, self.config.model.architecture)

    def model(self) -> HybridForCausalLM:
        """On the CPU, with the weights of the checkpoint, and its LoRA updates beside them if there are any.

        Raises:
            ValueError: the checkpoint does not fit, or the one that the run began with has gone.
        """
        if self.base is None:
            model = HybridForCausalLM(self.config.model, self.config.kernel)
        else:
            model = from_pretrained(self.base, self.config.kernel, dtype=dtype_named(self.config.init.dtype))
            if self.config.lora.rank:
                add_lora(model, self.config.lora, self.config.train.seed, str(self.base))
        try:
            state = load_file(self.checkpoint / "model.safetensors")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.checkpoint / 'model.safetensors'} cannot be read: {error}") from error
        load_weights(model, state, str(self.checkpoint))
        return model


def check_format(wanted: str | None, run: FinishedRun) -> None:
    """Raises ValueError where the run's model cannot be written as a checkpoint of the family `wanted`."""
    can = {"qwen3_5": ("qwen3_5", "qwen3_5_text")}.get(run.family, (run.family,))
    if wanted is not None and wanted not in can:
        raise ValueError(
            f"format={wanted}: the run's model is a {run.family}, which can be written as {', '.join(can)}"
        )


def model_card(run: FinishedRun, adapter: bool) -> str:
    """Markdown with the front matter that the Hub reads: what was trained on what, how far, and with which versions."""
    config, rows = run.config, [row for row in _metrics(run) if row["step"] <= run.step]
    environment = _json(run.folder / "environment.json")
    front = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    if run.base is not None:
        front["base_model"] = str(run.base)
    front["tags"] = ["qlatrain", "gated-deltanet", config.recipe] + (["lora"] if adapter else [])
    files, dataset = ", ".join(config.data.files), config.data.dataset
    facts = {
        "recipe": config.recipe + (f" from {run.base}" if run.base else " from scratch"),
        "data": f"{config.data.name} ({dataset or files or config.data.source}), {config.data.format}",
        "tokenizer": config.data.tokenizer,
        "steps": f"{run.step:,} of {config.train.steps:,}, {config.train.global_batch_size} rows of "
        f"{config.data.sequence_length:,} tokens each",
        "target tokens": f"{run.state['tokens']:,}",
        "loss": _last(rows, "loss"),
        "validation loss": _last(rows, "validation_loss"),
        "optimizer": f"{config.optim.name}, lr {config.optim.lr:g}, schedule {config.schedule.name}",
        "precision": {"no": "float32", "bf16": "bfloat16 autocast"}[config.train.mixed_precision],
    }
    if run.base is not None and config.lora.rank:
        lora = config.lora
        facts["LoRA"] = f"rank {lora.rank}, alpha {lora.alpha:g}, {', '.join(lora.targets)}" + (
            "" if adapter else ", merged"
        )
    versions = {"qlatrain": environment.get("qlatrain"), "commit": environment.get("git_commit")}
    versions |= environment.get("versions", {})
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value is not None)
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {config.run.name}\n\n"
        f"Trained with qlatrain.\n\n| | |\n|---|---|\n{table}\n\n"
        f"## Config\n\n```yaml\n{(run.folder / 'config.yaml').read_text(encoding='utf-8')}```\n"
    )


def _metrics(run: FinishedRun) -> list[dict]:
    path = run.folder / "metrics.jsonl"
    return read_metrics(path) if path.is_file() else []


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _last(rows: list[dict], key: str) -> str | None:
    values = [row for row in rows if row.get(key) is not None]
    return f"{values[-1][key]:.4f} at step {values[-1]['step']:,}" if values else None
