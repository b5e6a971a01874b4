"""The batches of a step, and that a peer takes the step that ours does."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qlatrain.bench.model_options import read_model
from qlatrain.bench.shapes import parse_batch
from qlatrain.bench.step_job import StepJob, random_batch
from qlatrain.bench.step_models import FlaModel, OurModel, Refused, TransformersModel, attend_with_torch, missing
from qlatrain.config import OptimConfig
from qlatrain.data.packing import IGNORE_INDEX
from qlatrain.metrics.flops import FlopCounter

MODELS = Path(__file__).parent.parent.parent / "configs" / "model"


def job(name: str = "qlatrain", shape: str = "2x48", **changes) -> StepJob:
    model = replace(read_model(MODELS, "tiny", "model"), num_hidden_layers=2, layer_pattern=["gdn", "attn"])
    # without decay, which ours spares the norms
    return replace(StepJob(name, shape=shape, model=model, optim=OptimConfig("adamw", weight_decay=0.0)), **changes)


@pytest.mark.parametrize("shape", ["3x40", "40 packed5", "40 packed1"])
def test_a_batch(shape):
    shape = parse_batch(shape)
    batch = random_batch(shape, vocab_size=1000, seed=3)
    assert batch.input_ids.shape == batch.labels.shape == (1, shape.all_tokens)
    documents = shape.batch if shape.documents is None else shape.documents
    assert len(batch.cu_seqlens) == documents + 1 and batch.num_targets == shape.all_tokens - documents
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        assert batch.labels[0, start : end - 1].equal(batch.input_ids[0, start + 1 : end])
        assert batch.labels[0, end - 1] == IGNORE_INDEX and batch.position_ids[0, start] == 0
    assert batch.input_ids.max() < 1000 and len(batch.input_ids.unique()) > 30
    again, other = random_batch(shape, 1000, seed=3), random_batch(shape, 1000, seed=4)
    assert batch.input_ids.equal(again.input_ids) and batch.cu_seqlens.equal(again.cu_seqlens)
    assert not batch.input_ids.equal(other.input_ids)


def test_packed_documents_are_others_in_each_step():
    shape = parse_batch("400 packed5")
    assert not random_batch(shape, 10, seed=0).cu_seqlens.equal(random_batch(shape, 10, seed=1).cu_seqlens)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_takes_the_same_step(checkpointing):
    """From the same weights: the same loss at once, and after updates of the same size."""
    changes = {"train": replace(job().train, activation_checkpointing=checkpointing)}
    ours, theirs = OurModel(job(**changes)), TransformersModel(job("transformers", **changes))
    assert theirs.parameters == ours.parameters == ours.flops.parameters.total
    theirs._model.load_state_dict(ours._model.state_dict())
    batches = [random_batch(parse_batch("2x48"), 320, seed) for seed in (0, 0, 0)]
    losses = [[model.loss(model.step(batch)) for batch in batches] for model in (ours, theirs)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][0] - losses[0][2] > 0.05  # the same tokens again: something has been learnt


def test_a_job_travels_as_json():
    sent = job("transformers", "40 packed5", optim=OptimConfig("adamw", betas=[0.8, 0.9]), steps=7)
    assert StepJob.from_json(sent.to_json()) == sent


def test_what_peers_cannot_run():
    with pytest.raises(Refused, match="does not keep packed documents apart"):
        TransformersModel(job("transformers", "40 packed5"))
    negative = replace(job().model, allow_neg_eigval=True)
    with pytest.raises(Refused, match="no negative eigenvalues"):
        TransformersModel(job("transformers", model=negative))
    with pytest.raises(Refused, match="its kernels need a GPU"):
        FlaModel(job("fla"))
    with pytest.raises(Refused, match="3 do not divide 128"):
        FlaModel(job("fla", model=replace(job().model, num_attention_heads=3)))


def test_flops_of_fla_are_those_of_the_model_it_has():
    """No output gate, and heads that fill the width."""
    model = replace(job().model, num_attention_heads=2, head_dim=32)
    counted = FlaModel.counted(None, model)
    assert counted.head_dim == 64 and counted.hidden_size == 128
    parts = {part.name: part.parameters for part in FlopCounter(counted).parts}
    assert parts["attention projections"] == 128 * (128 + 2 * 64) + 128 * 128
    pure = replace(model, layer_pattern=["gdn"])
    assert FlaModel.counted(None, pure) is pure


def test_missing(monkeypatch):
    assert missing("qlatrain") is None and missing("transformers") is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing("fla") == "flash-linear-attention is not installed: pip install flash-linear-attention"


def test_torchs_attention_in_place_of_flash_attn(monkeypatch):
    """Head h attends with key head h // group, to tokens before it alone, in each row."""
    layer = ModuleType("fla.layers.attn")
    monkeypatch.setitem(sys.modules, "fla.layers.attn", layer)
    attend_with_torch()
    q, k, v = (torch.randn(2, 7, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    found = layer.flash_attn_func(q, k, v, causal=True, window_size=(-1, -1))
    options = {"cu_seqlens_q": torch.tensor([0, 2, 7], dtype=torch.int32), "max_seqlen_q": 5}
    packed = layer.flash_attn_varlen_func(q[0], k[0], v[0], **options, causal=True, window_size=(-1, -1))
    for part in (slice(0, 2), slice(2, 7)):
        alone = layer.flash_attn_func(q[:1, part], k[:1, part], v[:1, part], causal=True, window_size=(-1, -1))
        assert torch.allclose(packed[part], alone[0], atol=1e-5)
    k, v = (x.repeat_interleave(2, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5
    scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), float("-inf"))
    assert torch.allclose(found, torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v), atol=1e-5)
