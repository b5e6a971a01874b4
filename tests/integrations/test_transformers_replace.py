"""Where `use_qlatrain_kernels` replaces, that it says so, that it can be undone, and when it refuses."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.qwen3_5 import modeling_qwen3_5 as inside
from transformers_helpers import FAMILIES, SIZES, inside_transformers, small_model, tokens

from qlatrain.integrations.transformers import families, use_qlatrain_kernels
from qlatrain.integrations.transformers.replace import Mark

every_family = pytest.mark.parametrize("family", FAMILIES)


def hooks_in(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@torch.no_grad()
def run(model: nn.Module, calls) -> int:
    """Calls the model once and tells how many operators of qlakernels that took."""
    calls.clear()
    model(tokens(1, 9), use_cache=False)
    return calls.total()


@every_family
def test_what_is_said_and_undone(family, calls, caplog):
    before, model = inside_transformers(), small_model(family)
    layer, norm = (type(x).__name__ for x in (model.model.layers[0].linear_attn, gated_norm(model)))
    with caplog.at_level(logging.INFO, logger="qlatrain"):
        handle = use_qlatrain_kernels(model, backend="torch")
    assert handle.replaced == (
        (layer, "chunk_gated_delta_rule", 2),
        (layer, "causal_conv1d", 2),
        (norm, "rms_norm_gated", 2),
    )
    (line,) = caplog.messages
    assert line.startswith(
        f"{type(model).__name__}: qlakernels (backend torch) runs chunk_gated_delta_rule, causal_conv1d in 2 {layer}; "
        f"rms_norm_gated in 2 {norm}; transformers 5."
    )
    assert "tested with 5.17 and 5.23" in line
    assert run(model, calls) == 6
    handle.undo()
    assert inside_transformers() == before and hooks_in(model) == 0
    assert run(model, calls) == 0
    handle.undo()


def gated_norm(model: nn.Module) -> nn.Module:
    layer = model.model.layers[0].linear_attn
    return layer.o_norm if hasattr(layer, "o_norm") else layer.norm


def test_other_models_are_left_alone(calls):
    model, other = small_model("qwen3_5"), small_model("qwen3_5")
    with use_qlatrain_kernels(model):
        assert (run(model, calls), run(other, calls)) == (6, 0)
        assert hooks_in(other) == 0


def test_every_model(calls):
    earlier = [small_model(family) for family in FAMILIES]
    before = inside_transformers()
    with use_qlatrain_kernels(backend="torch") as handle:
        later = [small_model(family) for family in FAMILIES]
        assert [run(model, calls) for model in earlier + later] == [6] * 8
    assert len(handle.replaced) == 3 * 4 and {count for *_, count in handle.replaced} == {None}
    assert "rms_norm_gated in every OlmoHybridRMSNormGated" in str(handle)
    assert [run(model, calls) for model in earlier + later] == [0] * 8
    assert inside_transformers() == before


@pytest.mark.parametrize("first_undone", [0, 1])
@pytest.mark.parametrize("everywhere", [False, True])
def test_twice(everywhere, first_undone, calls):
    """The later call counts, each undoes its own, in any order."""
    model = small_model("qwen3_5")
    handles = [
        use_qlatrain_kernels(None if everywhere else model, backend="torch"),
        use_qlatrain_kernels(model, backend="torch"),
    ]
    assert run(model, calls) == 6
    handles[first_undone].undo()
    assert run(model, calls) == 6
    handles[1 - first_undone].undo()
    assert run(model, calls) == 0


def test_the_backend_is_the_one_asked_for(calls):
    """No silent fallback: fla needs a GPU."""
    model = small_model("qwen3_5")
    with use_qlatrain_kernels(model, backend="torch"):
        with (
            use_qlatrain_kernels(model, backend="fla"),
            pytest.raises(ValueError, match="backend='fla' of gated_delta_rule cannot run here: needs a GPU"),
        ):
            run(model, calls)
        assert run(model, calls) == 6
    with pytest.raises(ValueError, match=r"backend=tilelan is not one of auto, .*; did you mean tilelang\?"):
        use_qlatrain_kernels(model, backend="tilelan")


def test_copies_of_a_model(calls):
    """Run through ours as long as the model does; what is pickled knows nothing of it."""
    model = small_model("qwen3_5")
    handle = use_qlatrain_kernels(model, backend="torch")
    copied = copy.deepcopy(model)
    assert run(copied, calls) == 6
    assert pickle.loads(pickle.dumps(Mark("torch")))(model, (), {}) is None
    handle.undo()
    with use_qlatrain_kernels(small_model("qwen3_5"), backend="torch"):
        assert run(copied, calls) == 0


def test_models_with_hooks_of_accelerate(calls):
    """As a model that was spread over devices has: they keep each module's forward as it was."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = small_model("qwen3_5")
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    handle = use_qlatrain_kernels(model, backend="torch")
    assert run(model, calls) == 6
    handle.undo()
    assert run(model, calls) == 0
    handle = use_qlatrain_kernels(model, backend="torch")
    remove_hook_from_module(model, recurse=True)
    assert run(model, calls) == 6
    handle.undo()
    assert run(model, calls) == 0


def test_models_whose_forwards_are_bound_to_them(calls):
    """As the package kernels leaves modules for which it has nothing."""
    model = small_model("qwen3_5")
    for module in (model.model.layers[0].linear_attn, gated_norm(model)):
        module.forward = module.forward
        assert "forward" in vars(module)
    with use_qlatrain_kernels(model, backend="torch"):
        assert run(model, calls) == 6
    assert run(model, calls) == 0


def test_under_torch_compile(calls):
    """Traced with and without: the graphs are told apart, though they are of the same functions."""
    model = small_model("qwen3_5", num_hidden_layers=1, layer_types=["linear_attention"])
    layer, x = model.model.layers[0].linear_attn, torch.randn(1, 9, 32)
    compiled = torch.compile(layer, backend="eager")
    with torch.no_grad():
        expected = compiled(x)
        assert not calls
        with use_qlatrain_kernels(model, backend="torch"):
            torch.testing.assert_close(compiled(x), expected)
            assert calls["chunk_gated_delta_rule"] > 0
        calls.clear()
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)
    assert not calls


@pytest.mark.parametrize("model", [nn.Linear(2, 2), LlamaForCausalLM], ids=["Linear", "LlamaForCausalLM"])
def test_models_without_such_layers(model):
    if not isinstance(model, nn.Module):
        sizes = {name: size for name, size in SIZES.items() if "linear" not in name and name != "layer_types"}
        model = model(LlamaConfig(**sizes))
    message = "has no Gated DeltaNet layer of transformers' qwen3_next, qwen3_5, qwen3_5_moe, olmo_hybrid"
    with pytest.raises(ValueError, match=f"^{type(model).__name__} {message}"):
        use_qlatrain_kernels(model)
    with pytest.raises(ValueError, match="str is not a model"):
        use_qlatrain_kernels("a model")


def without_name(monkeypatch, model):
    monkeypatch.delattr(inside, "causal_conv1d_fn")
    return "transformers.models.qwen3_5.modeling_qwen3_5.causal_conv1d_fn is missing"


def another_signature(monkeypatch, model):
    def torch_chunk_gated_delta_rule(query, key, value, decay, beta, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr(inside, "torch_chunk_gated_delta_rule", torch_chunk_gated_delta_rule)
    return "torch_chunk_gated_delta_rule takes (query, key, value, decay, beta, **kwargs) instead of (query, key, value"


def another_norm(monkeypatch, model):
    monkeypatch.setattr(inside.Qwen3_5RMSNormGated, "forward", lambda self, x, gate: x)
    return "Qwen3_5RMSNormGated.forward takes (self, x, gate) instead of (self, hidden_states, gate)"


def another_forward(monkeypatch, model):
    def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
        return inside.causal_conv1d_fn(hidden_states, cu_seqlens=kwargs.get("cu_seq_lens_q"))

    monkeypatch.setattr(inside.Qwen3_5GatedDeltaNet, "forward", forward)
    return "Qwen3_5GatedDeltaNet.forward no longer calls torch_chunk_gated_delta_rule"


def renamed_boundaries(monkeypatch, model):
    def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
        x = inside.causal_conv1d_fn(hidden_states)
        return inside.torch_chunk_gated_delta_rule(x, cu_seqlens=kwargs.get("document_starts"))

    monkeypatch.setattr(inside.Qwen3_5GatedDeltaNet, "forward", forward)
    return "Qwen3_5GatedDeltaNet.forward no longer hands on cu_seq_lens_q"


def another_activation(monkeypatch, model):
    model.model.layers[2].linear_attn.activation = "gelu"
    return "model.layers.2.linear_attn has activation 'gelu' instead of 'silu'"


def a_bias(monkeypatch, model):
    model.model.layers[2].linear_attn.conv1d.bias = nn.Parameter(torch.zeros(2 * 16 + 48))
    return "model.layers.2.linear_attn.conv1d has a bias"


def another_norm_module(monkeypatch, model):
    model.model.layers[2].linear_attn.norm = nn.Identity()
    return "model.layers.2.linear_attn holds no Qwen3_5RMSNormGated"


def a_renamed_epsilon(monkeypatch, model):
    del model.model.layers[2].linear_attn.norm.variance_epsilon
    return "model.layers.2.linear_attn's Qwen3_5RMSNormGated has no variance_epsilon"


def a_kernel_from_the_hub(monkeypatch, model):
    norm = model.model.layers[2].linear_attn.norm
    norm.forward = (lambda self, hidden_states, gate: hidden_states).__get__(norm)
    return "model.layers.2.linear_attn's Qwen3_5RMSNormGated has had its forward replaced"


def a_layer_of_the_users(monkeypatch, model):
    class Own(inside.Qwen3_5GatedDeltaNet):
        def forward(self, hidden_states, **kwargs):
            return hidden_states

    model.model.layers[2].linear_attn.__class__ = Own
    return "model.layers.2.linear_attn is a Own with a forward of its own"


OF_TRANSFORMERS = [without_name, another_signature, another_norm, another_forward, renamed_boundaries]
OF_THE_MODEL = [
    another_activation,
    a_bias,
    another_norm_module,
    a_renamed_epsilon,
    a_kernel_from_the_hub,
    a_layer_of_the_users,
]


@pytest.mark.parametrize("change", OF_TRANSFORMERS + OF_THE_MODEL, ids=lambda change: change.__name__)
def test_a_changed_inside_is_refused_and_nothing_changed(change, monkeypatch):
    model = small_model("qwen3_5")
    with monkeypatch.context() as patch:
        said = change(patch, model)
        calls = [lambda: use_qlatrain_kernels(model)]
        if change in OF_TRANSFORMERS:
            calls.append(use_qlatrain_kernels)  # not even in the families that are as expected
        for call in calls:
            before = everything_inside()
            with pytest.raises(ValueError) as refused:
                call()
            assert said in str(refused.value)
            assert str(refused.value).startswith("nothing was replaced, as transformers 5.")
            assert everything_inside() == before and hooks_in(model) == 0


def test_many_differences_are_not_all_listed():
    model = small_model("qwen3_5", num_hidden_layers=8, layer_types=["linear_attention"] * 7 + ["full_attention"])
    for layer in model.model.layers[:7]:
        layer.linear_attn.activation = "gelu"
    with pytest.raises(ValueError, match=r"layers.0.linear_attn has .*layers.4.linear_attn has [^;]*; and 2 more$"):
        use_qlatrain_kernels(model)


def everything_inside() -> list[dict]:
    modules = [(family, family.module()) for family in families.FAMILIES]
    return [dict(vars(x)) for family, m in modules for x in (m, getattr(m, family.layer), getattr(m, family.norm))]


def test_what_somebody_else_replaced_is_said_and_left(monkeypatch, calls):
    model, theirs = small_model("qwen3_5"), inside.causal_conv1d_fn
    handle = use_qlatrain_kernels(model, backend="torch")
    ours = inside.causal_conv1d_fn

    def causal_conv1d_fn(hidden_states, weight, bias=None, activation=None, **kwargs):
        return ours(hidden_states, weight, bias, activation, **kwargs)

    monkeypatch.setattr(inside, "causal_conv1d_fn", causal_conv1d_fn)
    with pytest.raises(ValueError, match="causal_conv1d_fn was replaced by something else since an earlier call"):
        use_qlatrain_kernels(model)
    handle.undo()
    assert inside.causal_conv1d_fn is causal_conv1d_fn
    assert run(model, calls) == 0  # what it calls of ours hands on to transformers' function
    monkeypatch.undo()
    inside.causal_conv1d_fn = theirs
