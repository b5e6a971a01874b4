"""Small models whose every parameter matters, for the tests of `qlatrain.models`."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from qlatrain.config import ModelConfig
from qlatrain.models import Documents, HybridForCausalLM

VOCABULARY = 61


# What makes `small_config` one of OLMo-Hybrid: heads of 10 fill the hidden size, and RoPE turns them as a whole.
OLMO = {
    "architecture": "olmo_hybrid",
    "hidden_size": 40,
    "head_dim": 10,
    "partial_rotary_factor": 1.0,
    "allow_neg_eigval": True,
}


def small_config(**changes) -> ModelConfig:
    """No two dimensions equal, so that a swapped pair cannot pass."""
    sizes = {
        "name": "small",
        "vocab_size": VOCABULARY,
        "hidden_size": 36,
        "intermediate_size": 52,
        "num_hidden_layers": 2,
        "layer_pattern": ["gdn", "attn"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_theta": 1000.0,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "tie_word_embeddings": False,
    }
    return ModelConfig(**sizes | changes)


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0, A: float | None = None) -> None:
    """Fills every parameter with values of a size that shows in the logits; by name, so ours or transformers' alike.

    A: the same decay rate for every head; random in (0.01, 4) when None.
    """
    random = torch.Generator().manual_seed(seed)
    centred_on_one = any("o_norm" in name for name, _ in model.named_parameters())  # all norms of OLMo-Hybrid
    for name, parameter in sorted(model.named_parameters()):
        values = torch.randn(parameter.shape, generator=random)
        last = name.split(".")[-1]
        if last == "A_log":
            values = (torch.rand(parameter.shape, generator=random) * 4 + 0.01 if A is None else values * 0 + A).log()
        elif last == "dt_bias":
            values = values - 2.0
        elif "norm" in name:
            values = values * 0.3 + (centred_on_one or "linear_attn.norm" in name)
        elif "embed_tokens" in name:
            pass
        elif "conv1d" in name:
            values = values * 0.5
        elif last == "weight":
            values = values / math.sqrt(parameter.shape[1])
        parameter.copy_(values)


def small_model(seed: int = 0, A: float | None = None, **changes) -> HybridForCausalLM:
    model = HybridForCausalLM(small_config(**changes), seed=seed)
    randomize(model, seed, A)
    return model


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def labels_for(input_ids: torch.Tensor, documents: Documents) -> torch.Tensor:
    """Each token's successor in its document, −100 at the last."""
    labels = input_ids.roll(-1, 1)
    labels[0, documents.cu_seqlens_cpu[1:].long() - 1] = -100
    return labels


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, in one file or in shards."""
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def assert_close_by_name(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """‖got − expected‖ ≤ tolerance · ‖expected‖ for each name, and no name whose expected value is zero."""
    assert got.keys() == expected.keys()
    for name, reference in expected.items():
        error, size = (got[name] - reference).norm().item(), reference.norm().item()
        assert size > 0, f"{name} is zero: the test says nothing about it"
        assert error <= tolerance * size, f"{name}: error {error:.2e} of {size:.2e}, relative {error / size:.1e}"
