"""A model, a layout and batches small enough that a step takes milliseconds."""

import numpy as np
import torch

from qlatrain.config import ModelConfig, OptimConfig, ParallelConfig
from qlatrain.data.packing import IGNORE_INDEX, PackedBatch, Row, StreamPosition
from qlatrain.models import HybridForCausalLM
from qlatrain.parallel import Layout
from qlatrain.training.optimizer import Optimizers

VOCABULARY = 29


def tiny_config(**changes) -> ModelConfig:
    sizes = {
        "name": "tiny",
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "layer_pattern": ["gdn", "attn"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "initializer_range": 0.2,
    }
    return ModelConfig(**sizes | changes)


def tiny_model(seed: int = 0, **changes) -> HybridForCausalLM:
    return HybridForCausalLM(tiny_config(**changes), seed=seed)


def one_process() -> Layout:
    return Layout(ParallelConfig(layout="single"), "no")


def optimizers_of(model: HybridForCausalLM, name: str = "muon", **changes) -> Optimizers:
    return Optimizers(list(model.named_parameters()), OptimConfig(name=name, **changes))


def row(*lengths: int, seed: int = 0) -> Row:
    """Documents of these lengths, one after the other, each of random tokens."""
    tokens = np.random.default_rng(seed).integers(VOCABULARY, size=sum(lengths)).astype(np.int32)
    labels = np.roll(tokens, -1)
    labels[np.cumsum(lengths) - 1] = IGNORE_INDEX
    return Row(tokens, labels, list(lengths), StreamPosition.beginning(1))


def batch(*rows: Row) -> PackedBatch:
    return PackedBatch.from_rows(list(rows))


def fill_gradients(model: torch.nn.Module, seed: int = 0, value: float | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        if value is not None:
            parameter.grad.flatten()[0] = value


def snapshot(model: torch.nn.Module, optimizers: Optimizers) -> dict[str, torch.Tensor]:
    """Copies of all weights and all optimizer state, by name."""
    named = {**dict(model.named_parameters()), **optimizers.state()}
    return {name: value.detach().clone() for name, value in named.items()}


def assert_identical(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    changed = [name for name in expected if not torch.equal(got[name], expected[name])]
    assert not changed, f"changed: {changed}"
