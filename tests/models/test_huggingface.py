"""Checkpoints that do not fit are refused as a whole; the loss and the ways to run a block change no number."""

import json
import logging

import pytest
import torch
from model_helpers import (
    VOCABULARY,
    assert_close_by_name,
    gradients,
    labels_for,
    small_config,
    small_model,
    tokens,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlatrain.models import Documents, HybridForCausalLM, from_pretrained, hybrid, save_pretrained
from qlatrain.models.attention import say
from qlatrain.models.huggingface import load_weights, weights


@pytest.fixture
def checkpoint(tmp_path):
    save_pretrained(small_model(), tmp_path)
    return tmp_path


def rewrite_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


# ---------------------------------------------------------------- what is refused


def test_every_fault_of_the_weights_at_once(checkpoint):
    path = checkpoint / "model.safetensors"
    state = load_file(path)
    del state["model.norm.weight"], state["model.layers.0.linear_attn.A_log"]
    state |= {"model.extra": torch.zeros(2), "another.extra": torch.zeros(2)}
    state["model.embed_tokens.weight"] = torch.zeros(3, 4)
    state["lm_head.weight"] = torch.zeros(5, 36)
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        from_pretrained(checkpoint)
    assert str(error.value) == (
        f"{checkpoint} does not fit the model: "
        "missing: model.layers.0.linear_attn.A_log, model.norm.weight; "
        "left over: another.extra, model.extra; "
        f"of another shape: lm_head.weight [5, 36] for [{VOCABULARY}, 36], "
        f"model.embed_tokens.weight [3, 4] for [{VOCABULARY}, 36]"
    )


@pytest.mark.parametrize("fault", ["missing", "left over", "of another shape"])
def test_nothing_is_loaded_from_weights_that_do_not_fit(fault):
    model, state = small_model(seed=0), weights(small_model(seed=1))
    if fault == "missing":
        del state["model.norm.weight"]
    elif fault == "left over":
        state["model.extra"] = torch.zeros(2)
    else:
        state["model.norm.weight"] = torch.zeros(1)  # would broadcast
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"here does not fit the model: {fault}: model"):
        load_weights(model, state, "here")
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_weights_that_fit_are_loaded():
    model, other = small_model(seed=0), small_model(seed=1)
    load_weights(model, weights(other), "here")
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in model.state_dict().items())


def test_another_family(checkpoint):
    rewrite_config(checkpoint, model_type="llama")
    with pytest.raises(ValueError, match="holds a model of type 'llama'; give one of type 'qwen3_5_text'"):
        from_pretrained(checkpoint)
    rewrite_config(checkpoint, model_type=...)
    with pytest.raises(ValueError, match="holds a model of type None"):
        from_pretrained(checkpoint)


def test_options_that_the_model_does_not_have(checkpoint):
    rewrite_config(checkpoint, hidden_act="gelu")
    with pytest.raises(ValueError, match="uses hidden_act='gelu'; only 'silu' is supported"):
        from_pretrained(checkpoint)
    rewrite_config(checkpoint, hidden_act="silu", rope_parameters={"rope_type": "yarn", "rope_theta": 1.0})
    with pytest.raises(ValueError, match="uses rope_type='yarn'; only 'default' is supported"):
        from_pretrained(checkpoint)


def test_a_layer_that_the_model_does_not_have(checkpoint):
    rewrite_config(checkpoint, layer_types=["linear_attention", "sliding_attention"])
    with pytest.raises(ValueError, match="sliding_attention"):
        from_pretrained(checkpoint)


def test_a_config_without_a_size(checkpoint):
    rewrite_config(checkpoint, linear_num_key_heads=...)
    with pytest.raises(ValueError, match="linear_num_key_heads"):
        from_pretrained(checkpoint)


@pytest.mark.parametrize("absent", ["config.json", "model.safetensors"])
def test_not_a_checkpoint(checkpoint, absent):
    for folder in (checkpoint / "nowhere", checkpoint / "config.json"):
        with pytest.raises(ValueError, match=r"is not a checkpoint: it needs config\.json and model\.safetensors"):
            from_pretrained(folder)
    (checkpoint / absent).unlink()
    with pytest.raises(ValueError, match="is not a checkpoint"):
        from_pretrained(checkpoint)


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_a_truncated_file(checkpoint, kept):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read: "):
        from_pretrained(checkpoint)


def test_a_truncated_config(checkpoint):
    path = checkpoint / "config.json"
    path.write_text(path.read_text()[:-10])
    with pytest.raises(ValueError):
        from_pretrained(checkpoint)


def test_negative_eigenvalues_are_ours_alone(tmp_path):
    """Transformers would halve every step size in silence, so it must not open such a checkpoint."""
    ours = small_model(allow_neg_eigval=True)
    save_pretrained(ours, tmp_path)
    with pytest.raises(ValueError, match="qlatrain_neg_eigval"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    back = from_pretrained(tmp_path)
    assert back.config.allow_neg_eigval
    input_ids = tokens(1, 70)
    with torch.no_grad():
        logits = ours(input_ids)
        assert torch.equal(back(input_ids), logits)
        assert (small_model(allow_neg_eigval=False)(input_ids) - logits).abs().max() > 0.01


def test_opening_leaves_the_random_state_alone_or_at_least_the_weights(checkpoint):
    """Weights come from the file, whatever the seed."""
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        states.append(from_pretrained(str(checkpoint)).state_dict())
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())


# ---------------------------------------------------------------- the loss in slices


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens_at_once", [1, 7, 99, 100])
def test_loss_in_slices_is_the_plain_loss(monkeypatch, tied, tokens_at_once):
    model = small_model(tie_word_embeddings=tied)
    documents = Documents.of_lengths([60, 1, 39])
    input_ids = tokens(1, 100)
    labels = labels_for(input_ids, documents)
    logits = model(input_ids, documents)
    plain = torch.nn.functional.cross_entropy(logits[0], labels[0], ignore_index=-100, reduction="sum")
    expected = gradients(model, plain)
    largest = []
    head = model.lm_head.register_forward_hook(lambda module, args, output: largest.append(output.numel()))
    monkeypatch.setattr(hybrid, "LOGITS_AT_ONCE", tokens_at_once * VOCABULARY)
    loss = model(input_ids, documents, labels)
    assert loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    assert_close_by_name(gradients(model, loss), expected, 1e-5)
    head.remove()
    assert max(largest) == tokens_at_once * VOCABULARY, "more logits were held than asked for"


def test_loss_without_targets(monkeypatch):
    model = small_model()
    for at_once in (10**9, VOCABULARY):
        monkeypatch.setattr(hybrid, "LOGITS_AT_ONCE", at_once)
        assert model(tokens(1, 10), labels=torch.full((1, 10), -100)).item() == 0


def test_loss_sums_over_tokens():
    """Two documents cost what they cost apart, so that micro-batches add up."""
    model = small_model()
    ids = tokens(2, 40)
    labels = tokens(2, 40, seed=1)
    together = model(ids, labels=labels)
    apart = sum(model(ids[i : i + 1], labels=labels[i : i + 1]) for i in range(2))
    torch.testing.assert_close(together, apart)
    assert together.item() > 40


# ---------------------------------------------------------------- ways to run a block


def loss_and_gradients(model):
    documents = Documents.of_lengths([70, 30])
    input_ids = tokens(1, 100)
    loss = model(input_ids, documents, labels_for(input_ids, documents))
    return loss.item(), gradients(model, loss)


def test_activation_checkpointing_changes_no_bit():
    model = small_model(num_hidden_layers=4)
    loss, expected = loss_and_gradients(model)
    model.model.activation_checkpointing = True
    calls = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpointed, got = loss_and_gradients(model)
    assert len(calls) == 8, "each block runs once forward and once more in the backward"
    assert checkpointed == loss
    assert all(torch.equal(x, expected[name]) for name, x in got.items())
    with torch.no_grad():
        model(tokens(1, 10))
    assert len(calls) == 12


@pytest.mark.parametrize("cast", [None, torch.float32])
def test_mlps_made_anew_change_nothing(cast, monkeypatch):
    monkeypatch.setattr(hybrid, "cast_dtype", lambda device_type: cast)
    model = small_model(num_hidden_layers=4)
    loss, expected = loss_and_gradients(model)
    kept, sizes = [], []
    for keep_products in (True, False):
        for mlp in model.model.mlps:
            mlp.keep_products = keep_products
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            again, got = loss_and_gradients(model)
        sizes.append(sum(kept))
        kept.clear()
        assert again == loss
        for name, x in got.items():
            if cast is None:
                assert torch.equal(x, expected[name])
            else:  # normed rows come again from another formula
                torch.testing.assert_close(x, expected[name], rtol=1e-4, atol=1e-5)
    if cast is None:  # else the normed rows of this narrow model take their place
        assert sizes[1] <= sizes[0] - 4 * 100 * 2 * model.config.intermediate_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_says_which_kernel_runs_once(caplog, dtype):
    say.cache_clear()
    caplog.set_level(logging.INFO, logger="qlatrain.models.attention")
    model = small_model(layer_pattern=["attn"], num_hidden_layers=3).to(dtype)
    model(tokens(1, 10))
    assert [record.getMessage() for record in caplog.records] == [
        f"attention: torch scaled_dot_product_attention by document (cpu, {dtype})"
    ]


def test_attention_under_autocast_is_in_half_precision(caplog):
    """Queries that rotary tables had widened to float32 would miss the fused kernel of the GPU."""
    say.cache_clear()
    caplog.set_level(logging.INFO, logger="qlatrain.models.attention")
    model = small_model(layer_pattern=["attn"])
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens(1, 10))
    assert [record.getMessage() for record in caplog.records] == [
        "attention: torch scaled_dot_product_attention by document (cpu, torch.bfloat16)"
    ]


def test_compiled_blocks():
    """Traced by dynamo and differentiated by AOT autograd, without the minutes of a C++ compiler behind them."""
    model = small_model()
    loss, expected = loss_and_gradients(model)
    for block in model.model.layers:
        block.compile(backend="aot_eager")
    compiled, got = loss_and_gradients(model)
    assert compiled == pytest.approx(loss, rel=1e-5)
    assert_close_by_name(got, expected, 1e-4)


def test_documents_that_are_not_of_these_tokens():
    """Attention would read the first row of a batch and add its result to every row."""
    for pattern in (["gdn"], ["attn"]):
        model = HybridForCausalLM(small_config(layer_pattern=pattern), seed=0)
        with pytest.raises(ValueError):
            model(tokens(2, 10), Documents.of_lengths([3, 7]))
