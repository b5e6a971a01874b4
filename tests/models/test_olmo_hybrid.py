"""OLMo-Hybrid is transformers' `OlmoHybridForCausalLM`: logits, gradients, and weights in both directions."""

import pytest
import torch
from model_helpers import (
    OLMO,
    assert_close_by_name,
    assert_same_bits,
    config_of,
    gradients,
    randomize,
    small_config,
    small_model,
    stored,
    tokens,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, OlmoHybridConfig, OlmoHybridForCausalLM

from qlatrain.models import from_pretrained, save_pretrained
from qlatrain.models.hf_config import from_hf_config, to_hf_config
from qlatrain.models.huggingface import weights

CONFIGS = {
    "gdn, attn": {},
    "gdn, gdn, gdn, attn": {"layer_pattern": ["gdn", "gdn", "gdn", "attn"], "num_hidden_layers": 4},
    "attn, gdn over three layers": {"layer_pattern": ["attn", "gdn"], "num_hidden_layers": 3},
    "no positions": {"rope_theta": None},
    "no negative eigenvalues": {"allow_neg_eigval": False},
    "K of 96, V of 192": {"linear_key_head_dim": 96, "linear_value_head_dim": 192, "linear_num_value_heads": 2},
    "three value heads for each key head": {"linear_num_value_heads": 6},
    "as many key-value heads": {"num_key_value_heads": 4},
    "heads that do not fill the hidden size": {"head_dim": 6},
    "tied": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "a filter of two taps": {"linear_conv_kernel_dim": 2},
    "a large epsilon": {"rms_norm_eps": 1e-2},  # not of the gated norm, which has its own
}


def olmo(**changes):
    return small_model(**OLMO | changes)


def theirs(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is OlmoHybridForCausalLM and model.dtype == torch.float32
    return model


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_and_gradients(changes, tmp_path):
    ours = olmo(**changes)
    save_pretrained(ours, tmp_path)
    hf = theirs(tmp_path)
    assert_same_bits(dict(ours.named_parameters()), dict(hf.named_parameters()))
    input_ids = tokens(2, 75)
    logits, expected = ours(input_ids), hf(input_ids=input_ids, use_cache=False).logits
    assert expected.std() > 0.3
    assert (logits - expected).abs().max() <= 1e-4
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    got, wanted = gradients(ours, (logits * direction).sum()), gradients(hf, (expected * direction).sum())
    assert_close_by_name(got, wanted, 1e-3)


@pytest.mark.parametrize(
    "changes",
    [{}, {"rope_theta": None}, {"tie_word_embeddings": True}, {"head_dim": 6}, {"allow_neg_eigval": False}],
)
def test_a_model_that_transformers_made(changes, tmp_path):
    config = small_config(**OLMO | changes)
    hf = OlmoHybridForCausalLM(OlmoHybridConfig(**to_hf_config(config)))
    randomize(hf, seed=3)
    hf.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    ours = from_pretrained(tmp_path / "theirs")
    assert to_hf_config(ours.config) == to_hf_config(config)
    assert_same_bits(dict(ours.named_parameters()), dict(hf.named_parameters()))
    input_ids = tokens(1, 70)
    with torch.no_grad():
        expected = hf(input_ids=input_ids, use_cache=False).logits
        assert (ours(input_ids) - expected).norm() <= 1e-5 * expected.norm()
    save_pretrained(ours, tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(tmp_path / "theirs")
    assert_same_bits(theirs(tmp_path / "again").state_dict(), hf.state_dict())


def test_the_names_of_the_released_models(tmp_path):
    """Some programs know those alone: the filters of q, k and v apart, and GDN's norms by their first names."""
    model = olmo(linear_value_head_dim=9)
    save_pretrained(model, tmp_path)
    shapes = {name: list(x.shape) for name, x in stored(tmp_path).items()}
    gdn, attn = "model.layers.0.", "model.layers.1."
    assert [shapes[f"{gdn}linear_attn.{x}_conv1d.weight"] for x in "qkv"] == [[16, 1, 4], [16, 1, 4], [36, 1, 4]]
    norms = {name for name in shapes if "layer" in name and name.endswith("norm.weight") and "attn." not in name}
    assert norms == {
        f"{gdn}attention_layer_norm.weight",
        f"{gdn}feedforward_layer_norm.weight",
        f"{attn}post_attention_layernorm.weight",
        f"{attn}post_feedforward_layernorm.weight",
    }
    assert_same_bits(weights(from_pretrained(tmp_path)), weights(model))


def test_the_names_of_the_modules_are_read_too(tmp_path):
    model = olmo()
    save_pretrained(model, tmp_path)
    save_file(weights(model), tmp_path / "model.safetensors")
    assert_same_bits(weights(from_pretrained(tmp_path)), weights(model))


def test_filters_that_do_not_add_up(tmp_path):
    save_pretrained(olmo(), tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    del state["model.layers.0.linear_attn.k_conv1d.weight"]
    save_file(state, path)
    with pytest.raises(ValueError, match=r"conv1d\.weight \[64, 1, 4\] for \[80, 1, 4\]$"):
        from_pretrained(tmp_path)
    state["model.layers.0.linear_attn.k_conv1d.weight"] = torch.zeros(16, 1, 3)
    save_file(state, path)
    with pytest.raises(
        ValueError, match=r"conv1d\.weight \[\[16, 1, 4\], \[16, 1, 3\], \[48, 1, 4\]\] for \[80, 1, 4\]$"
    ):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("rope", "theta"),
    [
        ({"rope_parameters": {"rope_theta": None}}, None),
        ({"rope_theta": None}, None),
        ({"rope_theta": 50.0}, 50.0),
        ({"rope_theta": 50.0, "rope_parameters": {"rope_theta": 70.0, "rope_type": "default"}}, 70.0),
        ({}, 10_000.0),
    ],
)
def test_where_older_configs_keep_theta(rope, theta, tmp_path):
    hf = to_hf_config(small_config(**OLMO))
    del hf["rope_parameters"]
    assert from_hf_config(hf | rope, "here").rope_theta == theta
    assert OlmoHybridConfig.from_dict(hf | rope).rope_parameters["rope_theta"] == theta


def test_half_precision_is_close_to_theirs(tmp_path):
    """Cosines and sines stay float32 in both; in bfloat16 positions would blur."""
    save_pretrained(olmo(), tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = from_pretrained(tmp_path, dtype=torch.bfloat16)
    input_ids = tokens(1, 300)
    with torch.no_grad():
        logits, expected = ours(input_ids).float(), hf(input_ids=input_ids, use_cache=False).logits.float()
    assert (logits - expected).norm() <= 0.03 * expected.norm()
    positions = torch.arange(300)[None]
    tables = zip(
        ours.model.rotary(positions, torch.bfloat16),
        hf.model.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), positions),
        strict=True,
    )
    for table, their_table in tables:
        assert table.dtype == their_table.dtype == torch.float32
        torch.testing.assert_close(table[:, :, 0], their_table)


def test_generation_of_transformers_continues_as_ours(tmp_path):
    ours = olmo()
    save_pretrained(ours, tmp_path)
    input_ids = tokens(1, 9)
    generated = theirs(tmp_path).generate(
        input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    with torch.no_grad():
        for _ in range(6):
            input_ids = torch.cat([input_ids, ours(input_ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, input_ids)
