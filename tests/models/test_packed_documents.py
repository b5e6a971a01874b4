"""A document packed among others is the document alone: outputs and gradients, through the whole model.

A = 0.05 with small time steps keeps a state alive over hundreds of tokens. Where decay is strong a leak between
documents dies out within a few tokens, and a test on it would pass for the wrong reason.
"""

import pytest
import torch
from model_helpers import OLMO, assert_close_by_name, gradients, labels_for, small_model, tokens

from qlatrain.models import Documents

MODELS = {
    "gdn, attn": {},
    "gdn": {"layer_pattern": ["gdn"]},
    "attn": {"layer_pattern": ["attn"]},
    "attn, gdn, gdn with negative eigenvalues": {
        "layer_pattern": ["attn", "gdn", "gdn"],
        "num_hidden_layers": 3,
        "allow_neg_eigval": True,
    },
    "olmo_hybrid": {**OLMO, "layer_pattern": ["gdn", "gdn", "attn"], "num_hidden_layers": 3},
    "olmo_hybrid without positions": {**OLMO, "rope_theta": None},
}
LENGTHS = {"of all lengths": [70, 1, 33, 130, 2, 33], "of one length": [66, 66, 66], "with empty ones": [40, 0, 65, 0]}


def slow_model(**changes):
    return small_model(A=0.05, **changes)


def forward_backward(model, input_ids, documents, labels):
    """Logits, and the gradients of the summed loss in the embeddings of the tokens and in every parameter."""
    embedded = []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, args, output: embedded.append(output))
    logits = model(input_ids, documents)
    hook.remove()
    loss = torch.nn.functional.cross_entropy(logits[0], labels[0], ignore_index=-100, reduction="sum")
    (in_tokens,) = torch.autograd.grad(loss, embedded, retain_graph=True)
    return logits.detach(), in_tokens, gradients(model, loss), loss.item()


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_packed_is_alone(changes, lengths):
    model = slow_model(**changes)
    documents = Documents.of_lengths(lengths)
    input_ids = tokens(1, sum(lengths))
    labels = labels_for(input_ids, documents)
    logits, in_tokens, in_parameters, loss = forward_backward(model, input_ids, documents, labels)

    start, summed, losses = 0, {name: torch.zeros_like(x) for name, x in in_parameters.items()}, 0.0
    for length in lengths:
        if length == 0:
            continue
        here = slice(start, start + length)
        alone = forward_backward(model, input_ids[:, here], Documents.of_lengths([length]), labels[:, here])
        torch.testing.assert_close(logits[:, here], alone[0], rtol=0, atol=2e-5)
        torch.testing.assert_close(in_tokens[:, here], alone[1], rtol=0, atol=1e-5 * max(1, in_tokens.abs().max()))
        for name, gradient in alone[2].items():
            summed[name] += gradient
        losses += alone[3]
        start += length
    assert start == input_ids.shape[1]
    assert_close_by_name(in_parameters, summed, 1e-4)
    assert loss == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_no_gradient_crosses(changes):
    model = slow_model(**changes)
    documents = Documents.of_lengths([50, 60, 40])
    input_ids = tokens(1, 150)
    labels = torch.full_like(input_ids, -100)
    labels[:, 50:110] = tokens(1, 60, seed=1)
    _, in_tokens, _, _ = forward_backward(model, input_ids, documents, labels)
    assert in_tokens[:, :50].abs().max() == 0 and in_tokens[:, 110:].abs().max() == 0
    assert in_tokens[:, 50].abs().max() > 0


def test_this_memory_is_long():
    """The tests above say something: without boundaries, the first document shows in the last token of the second."""
    model = slow_model(layer_pattern=["gdn"])
    input_ids, other = tokens(1, 300), tokens(1, 300)
    other[:, :100] = tokens(1, 100, seed=5)
    with torch.no_grad():
        apart = (model(input_ids) - model(other))[0, -1].abs().max()
        documents = Documents.of_lengths([100, 200])
        packed = (model(input_ids, documents) - model(other, documents))[0, 100:].abs().max()
    assert apart > 100 * 2e-5 and packed == 0  # a hundred times what the tests above let pass


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_rows_of_a_batch_are_packed_documents(changes):
    model = slow_model(**changes)
    input_ids = tokens(3, 70)
    documents = Documents.of_lengths([70, 70, 70])
    labels = labels_for(input_ids.flatten()[None], documents)
    rows, packed = model(input_ids), model(input_ids.flatten()[None], documents)
    assert rows.shape == (3, 70, model.config.vocab_size)
    assert torch.equal(rows.flatten(0, 1)[None], packed)
    for row, row_ids in zip(rows, input_ids, strict=True):
        torch.testing.assert_close(row[None], model(row_ids[None]), rtol=0, atol=2e-5)
    by_rows = model(input_ids, labels=labels.view(3, 70))
    assert torch.equal(by_rows, model(input_ids.flatten()[None], documents, labels))


def test_the_order_of_documents_does_not_matter():
    model = slow_model()
    lengths = [70, 1, 33, 130]
    documents = tokens(1, sum(lengths)).split(lengths, 1)
    with torch.no_grad():
        forth = model(torch.cat(documents, 1), Documents.of_lengths(lengths)).split(lengths, 1)
        back = model(torch.cat(documents[::-1], 1), Documents.of_lengths(lengths[::-1])).split(lengths[::-1], 1)
    for one, other in zip(forth, back[::-1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def test_documents_of_lengths():
    documents = Documents.of_lengths([3, 0, 2])
    assert documents.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert documents.cu_seqlens.tolist() == documents.cu_seqlens_cpu.tolist() == [0, 3, 3, 5]
    assert documents.max_seqlen == 3
    assert documents.position_ids.dtype == torch.int64
    assert documents.cu_seqlens.dtype == documents.cu_seqlens_cpu.dtype == torch.int32


@pytest.mark.parametrize("changes", [{}, OLMO], ids=["qwen3_5", "olmo_hybrid"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_packed_is_alone_under_autocast(lengths, changes):
    """In mixed precision too, where the parts of a layer meet in two dtypes; equal up to bfloat16's rounding."""
    model = slow_model(**changes)
    input_ids = tokens(1, sum(lengths))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids, Documents.of_lengths(lengths))
        alone = [
            model(part, Documents.of_lengths([part.shape[1]])) for part in input_ids.split(lengths, 1) if part.numel()
        ]
    exact = model(input_ids, Documents.of_lengths(lengths))
    assert (logits - torch.cat(alone, 1)).norm() <= 0.03 * exact.norm()
    assert (logits - exact).norm() <= 0.05 * exact.norm()
