"""The hybrid decoder is transformers' `Qwen3_5ForCausalLM`: logits, gradients, and weights in both directions."""

import pytest
import torch
from model_helpers import (
    assert_close_by_name,
    assert_same_bits,
    config_of,
    gradients,
    randomize,
    small_config,
    small_model,
    tokens,
)
from transformers import AutoModelForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from qlatrain.models import from_pretrained, save_pretrained
from qlatrain.models.hf_config import to_hf_config
from qlatrain.models.huggingface import weights

CONFIGS = {
    "gdn": {"layer_pattern": ["gdn"]},
    "attn": {"layer_pattern": ["attn"]},
    "gdn, attn": {},
    "gdn, gdn, gdn, attn": {"layer_pattern": ["gdn", "gdn", "gdn", "attn"], "num_hidden_layers": 4},
    "attn, gdn over three layers": {"layer_pattern": ["attn", "gdn"], "num_hidden_layers": 3},
    "tied": {"tie_word_embeddings": True},
    "one value head for each key head": {"linear_num_key_heads": 3, "linear_num_value_heads": 3},
    "three value heads for each key head": {"linear_num_key_heads": 2, "linear_num_value_heads": 6},
    "K above V": {"linear_key_head_dim": 20, "linear_value_head_dim": 4},
    "half of each head turned": {"partial_rotary_factor": 0.5},
    "all of each head turned": {"partial_rotary_factor": 1.0},
    "attention bias": {"attention_bias": True},
    "one key-value head": {"num_key_value_heads": 1},
    "as many key-value heads": {"num_key_value_heads": 4},
    "a filter of two taps": {"linear_conv_kernel_dim": 2},
    "a large epsilon": {"rms_norm_eps": 1e-2},
}


def theirs(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is Qwen3_5ForCausalLM and model.dtype == torch.float32
    return model


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_and_gradients(changes, tmp_path):
    ours = small_model(**changes)
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


def test_loss(tmp_path):
    """Theirs is a mean over targets, ours a sum: the same negative log-likelihoods."""
    ours = small_model()
    save_pretrained(ours, tmp_path)
    input_ids = tokens(2, 40)
    labels = torch.cat([input_ids[:, 1:], torch.full((2, 1), -100)], 1)
    loss = theirs(tmp_path)(input_ids=input_ids, labels=input_ids).loss
    torch.testing.assert_close(ours(input_ids, labels=labels) / (2 * 39), loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_travel_without_a_changed_bit(tied, tmp_path):
    ours = small_model(tie_word_embeddings=tied, num_hidden_layers=4)
    save_pretrained(ours, tmp_path / "ours", bos_token_id=3, eos_token_id=5)
    hf = theirs(tmp_path / "ours")
    assert (hf.config.bos_token_id, hf.config.eos_token_id) == (3, 5)
    hf.save_pretrained(tmp_path / "theirs")
    back = from_pretrained(tmp_path / "theirs")
    assert_same_bits(weights(ours), weights(back))
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == tied
    assert to_hf_config(back.config) == to_hf_config(ours.config)
    save_pretrained(back, tmp_path / "again")
    for name in ("ours", "theirs"):  # what either config says is said again
        again = config_of(tmp_path / "again")
        assert config_of(tmp_path / name) == {key: again[key] for key in config_of(tmp_path / name)}
    again, first = (tmp_path / name / "model.safetensors" for name in ("again", "ours"))
    assert again.read_bytes() == first.read_bytes()


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_that_transformers_made(tied, tmp_path):
    config = small_config(tie_word_embeddings=tied, partial_rotary_factor=0.5, num_hidden_layers=3)
    hf = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**to_hf_config(config)))
    randomize(hf, seed=3)
    hf.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs")
    input_ids = tokens(1, 70)
    with torch.no_grad():
        logits = ours(input_ids)
        expected = hf(input_ids=input_ids, use_cache=False).logits
    assert (logits - expected).norm() <= 1e-5 * expected.norm()
    save_pretrained(ours, tmp_path / "ours")
    assert_same_bits(theirs(tmp_path / "ours").state_dict(), hf.state_dict())


def test_a_half_precision_checkpoint_of_transformers(tmp_path):
    """Every bfloat16 number is a float32 number: nothing is lost on the way in."""
    hf = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**to_hf_config(small_config())))
    randomize(hf)
    hf.bfloat16().save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert_same_bits(weights(ours), {name: x.float() for name, x in hf.state_dict().items()})


def test_generation_of_transformers_continues_as_ours(tmp_path):
    """Theirs steps with caches, ours reads the whole text again for each token."""
    ours = small_model()
    save_pretrained(ours, tmp_path)
    input_ids = tokens(1, 9)
    everywhere = torch.ones_like(input_ids)  # or token 0 would be taken for padding
    generated = theirs(tmp_path).generate(
        input_ids, attention_mask=everywhere, max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    with torch.no_grad():
        for _ in range(8):
            input_ids = torch.cat([input_ids, ours(input_ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, input_ids)
