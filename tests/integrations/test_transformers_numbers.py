"""Models of transformers with qlakernels inside: the losses, gradients, tokens and documents that they have without."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DataCollatorWithFlattening, DynamicCache
from transformers_helpers import FAMILIES, assert_same, loss_and_gradients, small_model, tokens

from qlatrain.integrations.transformers import use_qlatrain_kernels

IN_TWO_LAYERS = {"causal_conv1d": 2, "chunk_gated_delta_rule": 2, "rms_norm_gated": 2}
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.parametrize("padded", ["no", "left", "right"])
@every_family
def test_loss_and_gradients(family, padded, calls):
    input_ids = tokens(2, 75)  # more than a chunk
    mask = torch.ones_like(input_ids)
    if padded != "no":
        mask[1, slice(0, 9) if padded == "left" else slice(-20, None)] = 0
    inputs = {
        "input_ids": input_ids * mask,
        "attention_mask": mask,
        "labels": input_ids.masked_fill(mask == 0, -100),
    }
    model = small_model(family)
    expected = loss_and_gradients(model, **inputs)
    assert not calls
    with use_qlatrain_kernels(model, backend="torch"):
        assert_same(loss_and_gradients(model, **inputs), expected)
    assert calls == IN_TWO_LAYERS


def test_step_sizes_up_to_two():
    """At 75 tokens transformers' own gradients are 1.1e-5 from those with the rule in float64, ours 1.7e-6."""
    model, input_ids = small_model("olmo_hybrid", linear_allow_neg_eigval=True), tokens(2, 75)
    inputs = {"input_ids": input_ids, "labels": input_ids}
    expected = loss_and_gradients(model, **inputs)
    with use_qlatrain_kernels(model, backend="torch"):
        assert_same(loss_and_gradients(model, **inputs), expected, tolerance=2e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, calls):
    model, input_ids = small_model("qwen3_5").train(), tokens(2, 40)
    inputs = {"input_ids": input_ids, "labels": input_ids}
    expected = loss_and_gradients(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})  # 5.17 has no other name for it
    model.enable_input_require_grads()
    with use_qlatrain_kernels(model, backend="torch"):
        loss = model(**inputs).loss
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same((loss.detach(), gradients), expected)
    assert calls == {name: 2 * count for name, count in IN_TWO_LAYERS.items()}  # all is computed a second time


@pytest.mark.parametrize("how", ["autocast", "weights"])
@every_family
def test_bfloat16_is_as_near_to_float32_as_theirs(family, how, calls):
    """Under autocast, as in accelerate's mixed precision, and with weights in bfloat16; the mean over three models."""
    distances = {"ours": 0.0, "theirs": 0.0}
    for seed in range(3):
        model, input_ids = small_model(family, seed), tokens(4, 75, seed=seed)
        with torch.no_grad():
            exact = model(input_ids).logits
            if how == "weights":
                model.bfloat16()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
                logits = {"theirs": model(input_ids).logits}
                with use_qlatrain_kernels(model, backend="torch"):
                    logits["ours"] = model(input_ids).logits
        assert logits["ours"].dtype == logits["theirs"].dtype == torch.bfloat16
        for whose in distances:
            distances[whose] += ((logits[whose].float() - exact).norm() / exact.norm()).item()
    assert calls == {name: 3 * count for name, count in IN_TWO_LAYERS.items()}
    assert distances["ours"] <= 1.05 * distances["theirs"] < 1


@every_family
def test_generation(family, calls):
    """A prefill by ours, which hands its states to the cache; one token at a time as before."""
    model, input_ids = small_model(family), tokens(2, 70)
    mask = torch.ones_like(input_ids)
    mask[1, :7] = 0
    inputs = {"input_ids": input_ids * mask, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs)
    with use_qlatrain_kernels(model, backend="torch"):
        generated = model.generate(**inputs)
        assert calls == {**IN_TWO_LAYERS, "rms_norm_gated": 2 * 6}
        assert torch.equal(generated, expected)


@pytest.mark.parametrize("cuts", [[1, 30], [2, 3], [65, 66, 67]], ids=str)
@every_family
def test_a_prefill_in_pieces(family, cuts):
    """From a cache on, with several tokens or one, also where the first piece is shorter than the filter."""
    model, input_ids = small_model(family), tokens(2, 72)
    with torch.no_grad():
        expected = model(input_ids, use_cache=False).logits
        pieces, cache = [], None
        with use_qlatrain_kernels(model, backend="torch"):
            for piece in input_ids.tensor_split(cuts, dim=1):
                output = model(piece, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-4, atol=1e-4)


LENGTHS = [1, 5, 70, 2, 19]


def alone(model, documents: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean loss over all targets, and its gradients, each document in a call of its own."""
    named = dict(model.named_parameters())
    logits = [model(document[None], use_cache=False).logits[0, :-1] for document in documents]
    loss = cross_entropy(torch.cat(logits), torch.cat([document[1:] for document in documents]))
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return loss.detach(), {name: g for name, g in zip(named, gradients, strict=True) if g is not None}


@pytest.mark.parametrize("given", ["cu_seq_lens_q", "seq_idx", "both"])
@every_family
def test_packed_documents_are_those_alone(family, given):
    """As transformers' collator hands them over. Gradients of documents of a token are compared with ours alone: what
    rounding leaves of their tiny keys, normalised, is not the same in transformers' convolution."""
    documents = [tokens(length, seed=length) for length in LENGTHS]
    batch = DataCollatorWithFlattening(
        return_flash_attn_kwargs=given != "seq_idx", return_seq_idx=given != "cu_seq_lens_q"
    )([{"input_ids": document} for document in documents])
    model = small_model(family)
    theirs, _ = alone(model, documents)
    with use_qlatrain_kernels(model, backend="torch"):
        expected = alone(model, documents)
        packed = loss_and_gradients(model, **batch, use_cache=False)
    assert_same(packed, expected)
    assert abs(packed[0] - theirs) <= 1e-5 * theirs


@pytest.mark.parametrize("lengths", [[1, 2], [1, 1, 3, 40]], ids=str)
@every_family
def test_packed_documents_with_a_cache(family, lengths):
    """transformers makes a cache in training too, unless told not to, and pads rows shorter than the filter. A layer
    by itself, as attention does not look for documents then."""
    model = small_model(family)
    layer = model.model.layers[0].linear_attn
    hidden = torch.randn(1, sum(lengths), 32, generator=torch.Generator().manual_seed(0))
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    with torch.no_grad():
        expected = torch.cat([layer(document) for document in hidden.split(lengths, dim=1)], 1)
        with use_qlatrain_kernels(model, backend="torch"):
            output = layer(hidden, cache_params=DynamicCache(config=model.config), cu_seq_lens_q=bounds)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_documents_without_boundaries_run_into_each_other():
    """What the README warns of: position_ids alone do not reach the layers."""
    documents = [tokens(length, seed=length) for length in LENGTHS]
    batch = DataCollatorWithFlattening()([{"input_ids": document} for document in documents])
    model = small_model("qwen3_5")
    expected, _ = alone(model, documents)
    with use_qlatrain_kernels(model, backend="torch"):
        assert abs(model(**batch, use_cache=False).loss - expected) > 1e-3


def test_packing_that_is_not_clear():
    model = small_model("qwen3_5")
    two_rows = {"input_ids": tokens(2, 8), "seq_idx": torch.zeros(2, 8, dtype=torch.int32)}
    continued = {"input_ids": tokens(1, 8), "cu_seq_lens_q": torch.tensor([0, 3, 8], dtype=torch.int32)}
    with use_qlatrain_kernels(model, backend="torch"), torch.no_grad():
        with pytest.raises(ValueError, match=r"seq_idx has shape \[2, 8\]: pack the documents into one row"):
            model(**two_rows)
        cache = model(tokens(1, 9), use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"2 packed documents .* start from a cache of 1 rows"):
            model(**continued, past_key_values=cache)
        with pytest.raises(ValueError, match="cu_seqlens ends at 8: it must end at the number of tokens, 9"):
            model(**continued | {"input_ids": tokens(1, 9)}, use_cache=False)
