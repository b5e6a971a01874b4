import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import OlmoHybridConfig, OlmoHybridForCausalLM, Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForCausalLM

from qlatrain.metrics.flops import CHUNK, GDN_BACKWARD, FlopCounter, gdn_operator_flops
from qlatrain.models.hf_config import to_hf_config

OLMO = {"architecture": "olmo_hybrid", "partial_rotary_factor": 1.0}


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def transformers_model(c) -> Qwen3_5ForCausalLM | OlmoHybridForCausalLM:
    if c.architecture == "olmo_hybrid":
        with torch.device("meta"):
            return OlmoHybridForCausalLM(OlmoHybridConfig(**to_hf_config(c)))
    config = Qwen3_5TextConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        layer_types=[{"gdn": "linear_attention", "attn": "full_attention"}[kind] for kind in c.layer_kinds],
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        attention_bias=c.attention_bias,
        linear_num_key_heads=c.linear_num_key_heads,
        linear_num_value_heads=c.linear_num_value_heads,
        linear_key_head_dim=c.linear_key_head_dim,
        linear_value_head_dim=c.linear_value_head_dim,
        linear_conv_kernel_dim=c.linear_conv_kernel_dim,
        tie_word_embeddings=c.tie_word_embeddings,
    )
    with torch.device("meta"):
        return Qwen3_5ForCausalLM(config)


def test_gdn_operator_figures():
    assert gdn_operator_flops(1, 1, 128, 128) == 163_840
    assert gdn_operator_flops(1, 2, 128, 128) / 2 == 147_456
    assert gdn_operator_flops(1, 1, 128, 128) * GDN_BACKWARD == 409_600


def test_gdn_operator_against_its_products():
    """One chunk of the algorithm written out as matrix products, counted by torch; K and V differ, groups of three."""
    key_heads, group, K, V = 2, 3, 96, 192
    value_heads = key_heads * group
    with FlopCounterMode(display=False) as counter:
        q, k = meta(key_heads, CHUNK, K), meta(key_heads, CHUNK, K)
        v, state = meta(value_heads, CHUNK, V), meta(value_heads, K, V)
        inverse, scores = (k @ k.mT).repeat(group, 1, 1), (q @ k.mT).repeat(group, 1, 1)
        q, k = q.repeat(group, 1, 1), k.repeat(group, 1, 1)
        new_v = inverse @ (v - k @ state)
        _ = q @ state + scores @ new_v
        _ = state + k.mT @ new_v
    assert counter.get_total_flops() == CHUNK * gdn_operator_flops(key_heads, value_heads, K, V)


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}, OLMO, OLMO | {"attention_bias": True}]
)
def test_parameters_against_transformers(small_config, changes):
    config = dataclasses.replace(small_config, **changes)
    model = transformers_model(config)
    counts = FlopCounter(config).parameters
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.embedding == config.vocab_size * config.hidden_size
    assert counts.head == (0 if config.tie_word_embeddings else counts.embedding)
    assert counts.total == counts.embedding + counts.head + counts.non_embedding
    assert sum(row.parameters for row in FlopCounter(config).table(100).rows) == counts.total


@pytest.mark.parametrize("changes", [{}, OLMO], ids=["qwen3_5", "olmo_hybrid"])
def test_linear_layers_against_torch(small_config, changes):
    """Every nn.Linear of transformers' own model, run forward and backward on one token."""
    small_config = dataclasses.replace(small_config, **changes)
    model = transformers_model(small_config)
    with FlopCounterMode(display=False) as counter:
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module(meta(1, module.in_features).requires_grad_()).sum().backward()
    linear_parts = {"GDN projections", "attention projections", "MLP", "output head"}
    rows = [row for row in FlopCounter(small_config).table(1).rows if row.part in linear_parts]
    assert len(rows) == 4
    assert counter.get_total_flops() == sum(row.train_flops_per_token for row in rows)
    assert counter.get_total_flops() == 3 * sum(row.forward_flops_per_token for row in rows)


def test_short_convolution_against_torch(small_config):
    """One token of a depthwise convolution over q, k and v channels needs one window of the kernel's length."""
    model = transformers_model(small_config)
    convolutions = [m.conv1d for m in model.modules() if hasattr(m, "conv1d")]
    with FlopCounterMode(display=False) as counter:
        for conv in convolutions:
            torch.nn.functional.conv1d(meta(1, conv.in_channels, 4), conv.weight, groups=conv.groups)
    row = next(r for r in FlopCounter(small_config).table(1).rows if r.part == "GDN short convolution")
    assert row.layers == len(convolutions) == 4
    assert counter.get_total_flops() == row.forward_flops_per_token


def test_attention_scores_over_documents(small_config):
    """Pair by pair: each query of a document meets the keys up to itself, in each head and attention layer."""
    lengths = [1, 7, 0, 64, 13, 200]
    pair = small_config.num_attention_heads * 2 * (2 * small_config.head_dim)  # q.k and p.v
    layers = small_config.layer_kinds.count("attn")
    scores = 3 * layers * pair * sum(position + 1 for length in lengths for position in range(length))
    counter = FlopCounter(small_config)
    without_attention = sum(
        r.train_flops_per_token for r in counter.table(1).rows if r.part != "attention scores"
    ) * sum(lengths)
    assert counter.step_flops(lengths) == scores + without_attention


def test_step_equals_table_on_equal_documents(small_config):
    counter = FlopCounter(small_config)
    table = counter.table(128)
    assert counter.step_flops([128] * 10) == pytest.approx(1280 * table.train_flops_per_token, rel=1e-12)
    assert sum(row.share for row in table.rows) == pytest.approx(1)
    # gradient products: all parts double but the operator
    operator = next(row for row in table.rows if row.part == "GDN operator")
    assert operator.train_flops_per_token == 3.5 * operator.forward_flops_per_token
    assert table.train_flops_per_token == 3 * table.forward_flops_per_token + 0.5 * operator.forward_flops_per_token


def test_packing_is_cheaper_than_one_document(small_config):
    counter = FlopCounter(small_config)
    assert counter.step_flops([4096]) > counter.step_flops([2048, 2048]) > counter.step_flops([1024] * 4)


def test_kinds_of_lengths(small_config):
    counter = FlopCounter(small_config)
    expected = counter.step_flops([5, 9, 300])
    assert counter.step_flops(np.array([5, 9, 300], dtype=np.int32)) == expected
    assert counter.step_flops(torch.tensor([5, 9, 300])) == expected
    assert counter.step_flops([]) == 0
    # a million tokens in one document overflow 32 bits when squared
    long = counter.step_flops(np.array([2**20], dtype=np.int32))
    assert long == counter.step_flops([2**20]) > 0
    with pytest.raises(ValueError, match="-3"):
        counter.step_flops([4, -3])
    with pytest.raises(ValueError, match="float64"):
        counter.step_flops([1.5])


def test_unknown_layer_kind(small_config):
    with pytest.raises(ValueError, match="mamba"):
        FlopCounter(dataclasses.replace(small_config, layer_pattern=["gdn", "mamba"]))
