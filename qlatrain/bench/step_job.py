"""What one process of `bench_step` is told, and the batches of its steps."""

import json
from dataclasses import asdict, dataclass, field

import numpy as np
from omegaconf import OmegaConf

from qlatrain.bench.shapes import BatchShape, parse_batch
from qlatrain.config import KernelConfig, ModelConfig, OptimConfig, StepConfig
from qlatrain.data.packing import IGNORE_INDEX, PackedBatch, Row, StreamPosition

OURS = "qlatrain"
FIFTH = 5  # the step by which everything has been compiled


@dataclass
class StepJob:
    """A model to measure: whose, its sizes, and how many steps of what."""

    name: str = OURS  # or a peer
    on_gpu: bool = False
    shape: str = "2x256"
    model: ModelConfig = field(default_factory=ModelConfig)
    train: StepConfig = field(default_factory=StepConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    kernel: KernelConfig = field(default_factory=KernelConfig)
    steps: int = 20
    warmup: int = 5
    profiled_steps: int = 3
    seed: int = 0

    @property
    def batch_shape(self) -> BatchShape:
        return parse_batch(self.shape)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "StepJob":
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), OmegaConf.create(json.loads(text))))


def random_batch(shape: BatchShape, vocab_size: int, seed: int) -> PackedBatch:
    """A batch of random tokens; every row is a document, or the one row holds documents of random lengths.

    A token's label is the next one of its document; the last of a document has none.
    """
    generator = np.random.default_rng(seed)
    bounds = shape.bounds(seed) or [0, shape.tokens]
    rows = []
    for _ in range(shape.batch):
        tokens = generator.integers(0, vocab_size, shape.tokens, dtype=np.int32)
        labels = np.append(tokens[1:], np.int32(IGNORE_INDEX))
        labels[np.array(bounds[1:]) - 1] = IGNORE_INDEX
        rows.append(Row(tokens, labels, np.diff(bounds).tolist(), StreamPosition.beginning(0)))
    return PackedBatch.from_rows(rows)
