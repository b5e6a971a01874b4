"""Blocks in half precision on a GPU are traced without a break, told on a CPU: nothing is run."""

import dataclasses

import pytest
import torch
from model_helpers import small_config

from qlakernels import backends
from qlatrain.config import KernelConfig
from qlatrain.models import HybridForCausalLM, attention, hybrid
from qlatrain.models.documents import Documents

GPU = torch.device("cuda")


class Traced(Exception):
    pass


@pytest.mark.parametrize("kind", ["gdn", "attn"])
@pytest.mark.parametrize("architecture", ["qwen3_5", "olmo_hybrid"])
@pytest.mark.parametrize("lengths", [[8, 8], [3, 13]], ids=["rows", "packed"])
def test_a_block(architecture, kind, lengths, monkeypatch):
    torch._dynamo.reset()
    for operator in ("gated_delta_net", "swiglu"):
        ours = dataclasses.replace(backends._registry[operator]["tilelang"], refuses=lambda call: None)
        monkeypatch.setitem(backends._registry[operator], "tilelang", ours)
    monkeypatch.setattr(backends, "_decided", {})
    monkeypatch.setattr(hybrid, "cast_dtype", lambda device_type: torch.bfloat16)
    on_gpu = lambda _, dtype, rows: "varlen" if rows is None else "rows"  # noqa: E731
    monkeypatch.setattr(attention, "path_of", on_gpu)
    model = HybridForCausalLM(small_config(architecture=architecture, layer_pattern=[kind]), seed=0)

    def backend(graph, inputs):
        raise Traced

    for block in model.model.layers:
        block.compile(fullgraph=True, backend=backend)
    ids = torch.zeros(1, 16, dtype=torch.long)
    with pytest.raises(Exception, match=r"raised:\s+Traced"):
        model(ids, Documents.of_lengths(lengths), labels=ids)


def test_where_they_are(monkeypatch):
    """Not on a CPU, without autocast, with sizes or a rule that are not ours, or with a bias or an adapter."""
    monkeypatch.setattr("qlakernels.gated_delta_rule.api.refused_by_hopper", lambda call: None)
    monkeypatch.setattr("qlakernels.short_conv.api.refused_by_hopper", lambda call: None)
    monkeypatch.setattr("qlakernels.norm.api.refused_by_hopper", lambda call: None)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device=None, **rest: empty(*shape, **rest))
    sizes = {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
    model = HybridForCausalLM(small_config(**sizes))
    assert model.traced_whole(GPU, torch.bfloat16)
    assert not model.traced_whole(torch.device("cpu"), torch.bfloat16) and not model.traced_whole(GPU, None)
    assert not HybridForCausalLM(small_config()).traced_whole(GPU, torch.bfloat16)
    assert not HybridForCausalLM(small_config(**sizes), KernelConfig("fla")).traced_whole(GPU, torch.bfloat16)
    assert not HybridForCausalLM(small_config(attention_bias=True, **sizes)).traced_whole(GPU, torch.bfloat16)
    model.model.layers[0].mlp.up_proj = torch.nn.Sequential(model.model.layers[0].mlp.up_proj)
    assert not model.traced_whole(GPU, torch.bfloat16)


def test_their_kernels_are_loaded_at_once(monkeypatch):
    loaded = []
    monkeypatch.setattr(hybrid.compiled, "load", lambda keys: loaded.append({key[0] for key in keys}))
    monkeypatch.setattr(HybridForCausalLM, "traced_whole", lambda self, device, dtype: dtype is not None)
    model = HybridForCausalLM(small_config(linear_key_head_dim=64, linear_value_head_dim=128))
    model.load_kernels(GPU, None)
    HybridForCausalLM(small_config(layer_pattern=["attn"])).load_kernels(GPU, torch.bfloat16)
    assert loaded == []
    model.load_kernels(GPU, torch.bfloat16)
    assert loaded[0] >= {"forward", "reverse", "gradients", "gate_gradients", "segments_reverse"}
    assert loaded[0] >= {"short_conv_backward", "gated_norm_backward", "swiglu_forward", "adamw_update"}
