"""Tiny models of the four families with weights that all show, and the same call with and without qlakernels."""

import math

import torch
from transformers import (
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from qlatrain.integrations.transformers import families

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
FAMILIES = {
    "qwen3_next": (Qwen3NextForCausalLM, Qwen3NextConfig, EXPERTS),
    "qwen3_5": (Qwen3_5ForCausalLM, Qwen3_5TextConfig, {}),
    "qwen3_5_moe": (Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig, EXPERTS),
    "olmo_hybrid": (
        OlmoHybridForCausalLM,
        OlmoHybridConfig,
        {"linear_allow_neg_eigval": False},
    ),
}


def small_model(family: str, seed: int = 0, **changes):
    model_class, config_class, own = FAMILIES[family]
    model = model_class(config_class(**SIZES | own | changes))
    randomize(model, seed)
    return model.eval()


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
    """Every parameter to a size at which it shows; norms centred where transformers centres them."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        values = torch.randn(parameter.shape, generator=random)
        last = name.split(".")[-1]
        if last == "A_log":
            values = (torch.rand(parameter.shape, generator=random) * 4 + 0.01).log()
        elif last == "dt_bias":
            values = values - 2.0
        elif "norm" in name:
            values = values * 0.3 + parameter.mean()
        elif "conv1d" in name:
            values = values * 0.5
        elif "embed_tokens" not in name:
            values = values / math.sqrt(parameter.shape[-1])
        parameter.copy_(values)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Never 0, which is padding."""
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(model: torch.nn.Module, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a call, and its gradient for every parameter that wants one, by name."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    loss = model(**inputs).loss
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return loss.detach(), {name: g for name, g in zip(named, gradients, strict=True) if g is not None}


def assert_same(got: tuple, expected: tuple, tolerance: float = 1e-5) -> None:
    """Losses and the gradients taken together equal to `tolerance` of their size, each by name to five times that."""
    assert abs(got[0] - expected[0]) <= tolerance * abs(expected[0]), f"loss {got[0]} instead of {expected[0]}"
    assert got[1].keys() == expected[1].keys()
    errors = {name: (got[1][name] - reference).norm().item() for name, reference in expected[1].items()}
    sizes = {name: reference.norm().item() for name, reference in expected[1].items()}
    for name, size in sizes.items():
        assert size > 0, f"{name} is zero: the test says nothing about it"
        assert errors[name] <= 5 * tolerance * size, f"{name}: error {errors[name]:.2e} of {size:.2e}"
    assert math.hypot(*errors.values()) <= tolerance * math.hypot(*sizes.values())


def inside_transformers() -> list:
    """What the families' modules hold where we replace."""
    modules = [(family, family.module()) for family in families.FAMILIES]
    return [
        thing
        for family, module in modules
        for thing in (
            getattr(module, families.CONVOLUTION),
            getattr(module, families.RULE),
            getattr(module, family.norm).forward,
        )
    ]
