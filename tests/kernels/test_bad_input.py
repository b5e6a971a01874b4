"""Every mistake is answered by a ValueError that names the argument and its value, and every choice is said once."""

import logging

import pytest
import torch
import torch._dynamo.testing
from kernel_helpers import make_inputs

from qlakernels import backends, causal_conv1d, chunk_gated_delta_rule, rms_norm_gated

T, HK, HV, K, V = 6, 2, 4, 8, 5


@pytest.fixture
def inputs():
    return make_inputs(T, key_heads=HK, value_heads=HV, key_dim=K, value_dim=V)


@pytest.fixture
def nothing_decided(monkeypatch):
    """As in a fresh process: no decision kept, nothing said."""
    monkeypatch.setattr(backends, "_decided", {})
    monkeypatch.setattr(backends, "_said", set())


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


BAD_CALLS = {
    "q of three dimensions": ({"q": zeros(T, HK, K)}, "q has shape [6, 2, 8]: give [B, T, H, D]"),
    "k of three dimensions": ({"k": zeros(T, HK, K)}, "k has shape [6, 2, 8]: give [B, T, H, D]"),
    "v of five dimensions": ({"v": zeros(1, 1, T, HV, V)}, "v has shape [1, 1, 6, 4, 5]: give [B, T, H, D]"),
    "q of integers": ({"q": zeros(1, T, HK, K, dtype=torch.int64)}, "q is torch.int64"),
    "k of another dtype": (
        {"k": zeros(1, T, HK, K, dtype=torch.bfloat16)},
        "k is torch.bfloat16 and q is torch.float32",
    ),
    "v of another dtype": (
        {"v": zeros(1, T, HV, V, dtype=torch.float16)},
        "v is torch.float16 and q is torch.float32",
    ),
    "k of another length": ({"k": zeros(1, T + 1, HK, K)}, "k has [B, T] = [1, 7], q [1, 6]"),
    "v of another batch": ({"v": zeros(2, T, HV, V)}, "v has [B, T] = [2, 6], q [1, 6]"),
    "k of other heads": ({"k": zeros(1, T, HK + 1, K)}, "k has shape [1, 6, 3, 8], q [1, 6, 2, 8]"),
    "k of another dimension": ({"k": zeros(1, T, HK, K + 1)}, "k has shape [1, 6, 2, 9], q [1, 6, 2, 8]"),
    "value heads that do not divide": (
        {"v": zeros(1, T, 5, V)},
        "v has 5 heads, which is not a multiple of the 2 heads of q and k",
    ),
    "no key heads": (
        {"q": zeros(1, T, 0, K), "k": zeros(1, T, 0, K)},
        "v has 4 heads, which is not a multiple of the 0 heads of q and k",
    ),
    "g by key heads": ({"g": zeros(1, T, HK)}, "g has shape [1, 6, 2]: give [B, T, Hv] = [1, 6, 4]"),
    "g per key dimension": ({"g": zeros(1, T, HV, K)}, "g has shape [1, 6, 4, 8]: give [B, T, Hv] = [1, 6, 4]"),
    "beta by key heads": ({"beta": zeros(1, T, HK)}, "beta has shape [1, 6, 2]: give [B, T, Hv] = [1, 6, 4]"),
    "gate without A_log": ({"use_gate_in_kernel": True}, "use_gate_in_kernel=True needs A_log"),
    "A_log without gate": ({"A_log": zeros(HV)}, "A_log and dt_bias are read only with use_gate_in_kernel=True"),
    "dt_bias without gate": ({"dt_bias": zeros(HV)}, "A_log and dt_bias are read only with use_gate_in_kernel=True"),
    "A_log by key heads": (
        {"use_gate_in_kernel": True, "A_log": zeros(HK)},
        "A_log has shape [2]: give [Hv] = [4]",
    ),
    "dt_bias by key heads": (
        {"use_gate_in_kernel": True, "A_log": zeros(HV), "dt_bias": zeros(HK)},
        "dt_bias has shape [2]: give [Hv] = [4]",
    ),
    "negative eigenvalues without sigmoid": (
        {"allow_neg_eigval": True},
        "allow_neg_eigval=True needs use_beta_sigmoid_in_kernel=True",
    ),
    "state of another batch": (
        {"initial_state": zeros(2, HV, K, V)},
        "initial_state has shape [2, 4, 8, 5]: give [N, Hv, K, V] = [1, 4, 8, 5]",
    ),
    "state transposed": (
        {"initial_state": zeros(1, HV, V, K)},
        "initial_state has shape [1, 4, 5, 8]: give [N, Hv, K, V] = [1, 4, 8, 5]",
    ),
    "states by row of packed documents": (
        {"initial_state": zeros(1, HV, K, V), "cu_seqlens": torch.tensor([0, 2, T])},
        "initial_state has shape [1, 4, 8, 5]: give [N, Hv, K, V] = [2, 4, 8, 5]",
    ),
}

BAD_BOUNDARIES = {
    "a float tensor": (torch.tensor([0.0, T]), "cu_seqlens is a torch.float32 tensor of shape [2]"),
    "int16": (torch.tensor([0, T], dtype=torch.int16), "cu_seqlens is a torch.int16 tensor of shape [2]"),
    "two dimensions": (torch.tensor([[0, T]]), "cu_seqlens is a torch.int64 tensor of shape [1, 2]"),
    "one number": (torch.tensor([0]), "cu_seqlens is a torch.int64 tensor of shape [1]: give an int32 or int64"),
    "a start after 0": (torch.tensor([1, T]), "cu_seqlens starts at 1: it must start at 0"),
    "a descent": (torch.tensor([0, 4, 3, T]), "cu_seqlens descends from 4 to 3 at index 2"),
    "an early end": (torch.tensor([0, 2, 5]), "cu_seqlens ends at 5: it must end at the number of tokens, 6"),
    "a late end": (torch.tensor([0, 2, 7]), "cu_seqlens ends at 7: it must end at the number of tokens, 6"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_gated_delta_rule(inputs, changes, message):
    del inputs["initial_state"]
    chunk_gated_delta_rule(**inputs)
    with pytest.raises(ValueError) as error:
        chunk_gated_delta_rule(**inputs | changes)
    assert message in str(error.value)


@pytest.mark.parametrize(("cu_seqlens", "message"), BAD_BOUNDARIES.values(), ids=BAD_BOUNDARIES.keys())
def test_boundaries(inputs, cu_seqlens, message):
    del inputs["initial_state"]
    with pytest.raises(ValueError) as error:
        chunk_gated_delta_rule(**inputs, cu_seqlens=cu_seqlens)
    assert message in str(error.value)
    with pytest.raises(ValueError) as error:
        causal_conv1d(zeros(1, T, 3), zeros(3, 4), cu_seqlens=cu_seqlens)
    assert message in str(error.value)


def test_boundaries_on_the_host_are_the_ones_read(inputs):
    del inputs["initial_state"]
    cu_seqlens = torch.tensor([0, 2, T])
    with pytest.raises(ValueError, match="cu_seqlens ends at 5"):
        chunk_gated_delta_rule(**inputs, cu_seqlens=cu_seqlens, cu_seqlens_cpu=torch.tensor([0, 2, 5]))
    with pytest.raises(ValueError, match=r"cu_seqlens_cpu has shape \[2\], cu_seqlens \[3\]"):
        chunk_gated_delta_rule(**inputs, cu_seqlens=cu_seqlens, cu_seqlens_cpu=torch.tensor([0, T]))


def test_boundaries_with_a_batch():
    inputs = make_inputs(T, batch=2)
    with pytest.raises(ValueError, match=r"batch is 2 with cu_seqlens: flatten the batch to \[1, B\*T"):
        chunk_gated_delta_rule(**inputs, cu_seqlens=torch.tensor([0, T]))
    with pytest.raises(ValueError, match="batch is 2 with cu_seqlens"):
        causal_conv1d(zeros(2, T, 3), zeros(3, 4), cu_seqlens=torch.tensor([0, T]))


@pytest.mark.parametrize(
    ("x", "weight"),
    [((T, 3), (3, 4)), ((1, T, 3), (3, 1, 4)), ((1, T, 3), (4, 3))],
    ids=["x of two dimensions", "weight of three dimensions", "weight transposed"],
)
def test_short_conv(x, weight):
    with pytest.raises(ValueError) as error:
        causal_conv1d(zeros(*x), zeros(*weight))
    assert f"x has shape {list(x)}, weight {list(weight)}: give [B, T, D] and [D, W]" in str(error.value)


def test_short_conv_activation():
    with pytest.raises(ValueError, match="activation='gelu': give 'silu' or None"):
        causal_conv1d(zeros(1, T, 3), zeros(3, 4), activation="gelu")


@pytest.mark.parametrize(
    ("gate", "weight"),
    [((2, 3, 8), (4,)), ((2, 3, 4), (8,)), ((3, 8), (8,)), ((2, 3, 8), (1, 8))],
)
def test_norm(gate, weight):
    with pytest.raises(ValueError) as error:
        rms_norm_gated(zeros(2, 3, 8), zeros(*gate), zeros(*weight))
    assert f"x has shape [2, 3, 8], gate {list(gate)}, weight {list(weight)}" in str(error.value)


# ---------------------------------------------------------------- the choice of a backend


def test_unknown_backend(inputs):
    with pytest.raises(ValueError) as error:
        chunk_gated_delta_rule(**inputs, backend="tilelnag")
    assert str(error.value) == (
        "backend='tilelnag' is not a backend of gated_delta_rule: use auto, tilelang, flash_qla, fla, torch"
        "; did you mean 'tilelang'?"
    )
    with pytest.raises(ValueError) as error:
        chunk_gated_delta_rule(**inputs, backend="xyzzy")
    assert "backend='xyzzy'" in str(error.value) and "did you mean" not in str(error.value)
    for call in (
        lambda: causal_conv1d(zeros(1, T, 3), zeros(3, 4), backend="torhc"),
        lambda: rms_norm_gated(zeros(2, 8), zeros(2, 8), zeros(8), backend="torhc"),
    ):
        with pytest.raises(ValueError, match=r"backend='torhc' is not a backend of .*; did you mean 'torch'"):
            call()


@pytest.mark.parametrize("name", ["tilelang", "flash_qla", "fla"])
def test_a_backend_asked_for_by_name_is_never_replaced(inputs, name):
    """On tensors of the CPU these three can only refuse."""
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            chunk_gated_delta_rule(**inputs, backend=name)
        assert f"backend='{name}' of gated_delta_rule cannot run here: needs a" in str(error.value)
        assert "the tensors are on cpu" in str(error.value)


def test_no_backend_at_all(monkeypatch, nothing_decided):
    monkeypatch.setattr(backends, "_registry", {})
    backends.register("op", backends.Backend("first", lambda call: "too small", None))
    backends.register("op", backends.Backend("second", lambda call: "too old", None))
    with pytest.raises(ValueError, match="no backend of op can run this call: first: too small; second: too old"):
        backends.select("op", "auto", backends.Call(torch.device("cpu"), torch.float32, 1, 1))


def test_the_first_that_can_run_is_taken(monkeypatch, nothing_decided):
    monkeypatch.setattr(backends, "_registry", {})
    for name, reason in (("first", "too small"), ("second", None), ("third", None)):
        backends.register("op", backends.Backend(name, lambda call, reason=reason: reason, None))
    call = backends.Call(torch.device("cpu"), torch.float32, 1, 1)
    assert backends.backend_names("op") == ["first", "second", "third"]
    assert backends.select("op", "auto", call).name == "second"
    assert backends.select("op", "auto", call).name == "second"
    assert backends.select("op", "third", call).name == "third"
    assert backends.decisions() == [
        "op: backend second on cpu (not first: too small)",
        "op: backend third on cpu (asked for)",
    ]


def test_one_that_is_passed_over_runs_by_name(monkeypatch, nothing_decided):
    monkeypatch.setattr(backends, "_registry", {})
    backends.register("op", backends.Backend("first", lambda call: None, None, passed_over="not proven"))
    backends.register("op", backends.Backend("second", lambda call: None, None))
    call = backends.Call(torch.device("cpu"), torch.float32, 1, 1)
    assert backends.select("op", "auto", call).name == "second"
    assert backends.select("op", "first", call).name == "first"
    assert backends.decisions() == [
        "op: backend first on cpu (asked for)",
        "op: backend second on cpu (not first: not proven)",
    ]


def test_a_decision_of_another_operator_has_nothing_traced_again(monkeypatch, nothing_decided):
    """As when the loss decides behind the blocks: those are not compiled anew at the second step."""
    torch._dynamo.reset()
    monkeypatch.setattr(backends, "_registry", {})
    for operator in ("op", "loss"):
        backends.register(operator, backends.Backend("first", lambda call: None, torch.sin))
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def block(x):
        return backends.select("op", "auto", call_of(x)).run(x)

    def call_of(x):
        return backends.Call(torch.device(x.device.type), x.dtype, x.shape[-1], x.shape[-1])

    x = torch.ones(3, 4)
    backends.select("op", "auto", call_of(x))
    block(x)
    backends.select("loss", "auto", call_of(x))
    assert torch.equal(block(x), x.sin())
    assert counter.frame_count == 1


def test_one_line_for_each_decision(inputs, caplog, nothing_decided):
    caplog.set_level(logging.INFO, logger="qlakernels")

    def said():
        lines = [record.getMessage() for record in caplog.records if record.name == "qlakernels"]
        caplog.clear()
        return lines

    chunk_gated_delta_rule(**inputs)
    (line,) = said()
    assert line.startswith("gated_delta_rule: backend torch on cpu (not ")
    for other in ("tilelang: needs a Hopper GPU", "flash_qla: needs a GPU", "fla: needs a GPU"):
        assert f"{other}, the tensors are on cpu" in line
    chunk_gated_delta_rule(**inputs)
    chunk_gated_delta_rule(**make_inputs(T + 1, key_dim=3))  # another call, the same decision
    assert said() == []
    chunk_gated_delta_rule(**inputs, backend="torch")
    chunk_gated_delta_rule(**inputs, backend="torch")
    assert said() == ["gated_delta_rule: backend torch on cpu (asked for)"]
    causal_conv1d(zeros(1, T, 3), zeros(3, 4))
    rms_norm_gated(zeros(2, 8), zeros(2, 8), zeros(8))
    assert said() == [
        "causal_conv1d: backend torch on cpu (not tilelang: needs a Hopper GPU, the tensors are on cpu)",
        "rms_norm_gated: backend torch on cpu (not tilelang: needs a Hopper GPU, the tensors are on cpu)",
    ]
    assert len(backends.decisions()) == 4
