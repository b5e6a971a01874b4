"""What the processes of the finetuning benchmark are told, and the files that all of them work on."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from qlatrain.config import ModelConfig
from qlatrain.data import read_chat_template
from qlatrain.data.tokenizer import BytesTokenizer
from qlatrain.files import folder_written_aside, write_aside
from qlatrain.models import HybridForCausalLM, save_pretrained

OURS, PEER = "qlatrain", "transformers"
FULL_ROW = 4096  # tokens of a row from which on conversations have their natural lengths


@dataclass(frozen=True)
class FinetuneJob:
    """One side, its files, and how many steps of what.

    Attributes:
        root: of the checkout, where `train.py` is.
        micro_rows: rows through the model at once; the rest of a step is accumulated.
    """

    side: str
    root: str
    checkpoint: str
    conversations: str
    run_dir: str
    on_gpu: bool
    row_tokens: int
    rows_per_step: int
    micro_rows: int
    warmup: int
    steps: int
    compile: bool
    seed: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "FinetuneJob":
        return cls(**json.loads(text))

    @property
    def mixed_precision(self) -> str:
        """bf16 over float32 weights on a GPU; plain float32 on a CPU, where bf16 says nothing about speed."""
        return "bf16" if self.on_gpu else "no"

    @property
    def overrides(self) -> list[str]:
        """The arguments of `train.py --config-name finetune`. The peer takes its rows and its AdamW from the same."""
        return [
            f"init.checkpoint={self.checkpoint}",
            f"data.files=[{self.conversations}]",
            f"data.sequence_length={self.row_tokens}",
            f"run.dir={self.run_dir}",
            "resume=never",
            "schedule.warmup_steps=0",
            "schedule.final=1.0",  # a constant rate
            f"train.steps={self.warmup + self.steps}",
            f"train.seed={self.seed}",
            f"train.global_batch_size={self.rows_per_step}",
            f"train.micro_batch_size={self.micro_rows}",
            f"train.mixed_precision={self.mixed_precision}",
            f"train.compile={str(self.compile).lower()}",
            f"checkpoint.every={self.warmup + self.steps}",
            "validation.every=0",
            f"validation.rows={self.micro_rows}",
        ]


def write_checkpoint(config: ModelConfig, folder: Path, seed: int, max_shard_bytes: int) -> None:
    """Random weights in bfloat16, with a tokenizer of bytes and a chat template; all of `folder` or nothing."""
    tokenizer = BytesTokenizer(read_chat_template("bos_eos"))
    model = HybridForCausalLM(config, seed=seed)
    with folder_written_aside(folder) as aside:
        ids = tokenizer.bos_id, tokenizer.eos_id
        save_pretrained(model, aside, *ids, max_shard_bytes=max_shard_bytes, dtype=torch.bfloat16)
        tokenizer.save_pretrained(aside)


def checkpoint_sizes(folder: Path) -> dict:
    """Bytes of its weights, and how they are split."""
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    return {"bytes": sum(sizes), "shards": len(sizes), "largest_shard_bytes": max(sizes)}


def write_conversations(path: Path, tokens: int, row_tokens: int, seed: int) -> int:
    """Conversations of at least so many tokens (bytes) in all, as JSON lines; how many there are.

    Words follow Zipf's law. Of one to four exchanges each; questions have a median of 120 bytes, answers of 500, both
    log-normal, so that most rows of 4096 hold several conversations and a few fill one. For shorter rows all lengths
    shrink with the row.
    """
    generator = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(generator.choice(letters, length)) for length in generator.integers(1, 11, 4000)])
    frequency = 1 / np.arange(1, len(words) + 1)
    frequency /= frequency.sum()
    scale = min(1.0, row_tokens / FULL_ROW)

    def text(median: float, spread: float) -> str:
        length = max(8, int(scale * generator.lognormal(np.log(median), spread)))
        drawn = generator.choice(words, length // 2, p=frequency)
        return " ".join(drawn)[:length].strip()

    lines, written = [], 0
    while written < tokens:
        messages = []
        for _ in range(generator.integers(1, 5)):
            messages.append({"role": "user", "content": text(120, 0.8)})
            messages.append({"role": "assistant", "content": text(500, 0.9)})
        written += min(row_tokens, sum(len(message["content"]) for message in messages))
        lines.append(json.dumps({"messages": messages}))
    write_aside(path, "\n".join(lines) + "\n")
    return len(lines)
