"""The judge of the GPU tests, judged: its quick float64 reference against the recurrence, and what it notices."""

import json

import hopper_helpers
import pytest
import torch
from hopper_helpers import (
    BARS,
    boundaries,
    judge,
    make_cotangents,
    make_inputs,
    natural_sizes,
    reference,
    with_raw_gates,
)

GATES = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True}
SMALL = {"key_heads": 1, "value_heads": 2, "key_dim": 16, "value_dim": 24}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(hopper_helpers, "DEVICE", "cpu")
    monkeypatch.setattr(hopper_helpers, "worst_errors", {})


def both_references(inputs, monkeypatch, documents=1, **options):
    cotangents = make_cotangents(inputs, documents)
    expected = reference(inputs, cotangents, **options)
    monkeypatch.setattr(hopper_helpers, "TOKENS_OF_THE_RECURRENCE", 0)
    return expected, reference(inputs, cotangents, **options)


def assert_equal_to(got, expected, tolerance):
    for name, x in expected.items():
        assert x.dtype == got[name].dtype == torch.float64
        assert (got[name] - x).norm() <= tolerance * x.norm() + 1e-30, name


@pytest.mark.parametrize("g", [0.0, -20.0, "mixed", "slow"])
@pytest.mark.parametrize("keys", ["random", "similar", "long"])
def test_quick_reference(g, keys, monkeypatch):
    inputs = make_inputs(200, batch=2, g=g, keys=keys, beta="half", **SMALL)
    assert_equal_to(*reversed(both_references(inputs, monkeypatch, documents=2)), 1e-10)


@pytest.mark.parametrize("bias", [False, True])
def test_quick_reference_with_every_option(bias, monkeypatch):
    lengths = [1, 0, 63, 65, 0, 70]
    inputs = with_raw_gates(make_inputs(lengths=lengths, keys="raw", **SMALL), decay=[0.05, 16.0], bias=bias)
    options = {"use_qk_l2norm_in_kernel": True, "cu_seqlens": boundaries(lengths), "scale": 0.3, **GATES}
    expected, got = both_references(inputs, monkeypatch, documents=len(lengths), **options)
    assert_equal_to(got, expected, 1e-10)


def test_natural_sizes():
    """Of one token, the root of the sum of squares is the sum."""
    inputs = with_raw_gates(make_inputs(1, **SMALL), decay=[0.05, 2.0])
    expected = reference(inputs, make_cotangents(inputs, 1), **GATES)
    sizes, alike = natural_sizes(inputs, expected, False), natural_sizes(inputs, expected, True)
    for name in ("dA_log", "ddt_bias"):
        torch.testing.assert_close(sizes[name], expected[name].abs())
        torch.testing.assert_close(alike[name], expected[name].abs().max().expand(2))


@pytest.mark.parametrize("name", ["o", "dk", "dg", "dinitial_state", "dA_log"])
def test_one_bad_head_is_named(name):
    inputs = with_raw_gates(make_inputs(70, **SMALL), decay=1.0)
    expected = reference(inputs, make_cotangents(inputs, 1), **GATES)
    judge(expected, expected)
    heads = hopper_helpers.head_norms(expected[name], name)
    head = len(heads) - 1
    for damage in (1.5 * BARS["ordinary"][name], float("nan")):
        bad = {key: x.clone() for key, x in expected.items()}
        x = bad[name].movedim(hopper_helpers.HEAD_DIM.get(name.removeprefix("d"), 2), 0)
        x[head] *= 1 + damage
        with pytest.raises(AssertionError, match=f"{name}, head {head}: relative error") as error:
            judge(bad, expected)
        assert str(error.value).count("relative error") == 1


def test_record(tmp_path):
    inputs = make_inputs(20, **SMALL)
    expected = reference(inputs, make_cotangents(inputs, 1))
    judge({name: x * 1.001 for name, x in expected.items()}, expected)
    hopper_helpers.write_record(str(tmp_path / "errors.json"))
    written = json.loads((tmp_path / "errors.json").read_text())
    assert written["tests"]["test_record"]["dq"]["error"] == pytest.approx(1e-3)
    assert written["closest_to_the_bar"]["o"]["fraction_of_bar"] == pytest.approx(0.25)


def test_bars_are_stated_for_every_tensor():
    assert all(set(bars) == set(BARS["ordinary"]) for bars in BARS.values())
