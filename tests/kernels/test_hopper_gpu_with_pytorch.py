"""The TileLang kernels of the gated delta rule as PyTorch calls them: layouts, repeats, compilation, graphs, bad input.

Needs a Hopper GPU. What they compute is judged in `test_hopper_gpu`.
"""

import subprocess
import sys
from pathlib import Path

import hopper_helpers
import pytest
import torch
from hopper_helpers import (
    ALL_OPTIONS,
    MIX,
    assert_same_bits,
    boundaries,
    evaluate,
    judge,
    make_cotangents,
    make_inputs,
    natural_sizes,
    poison_free_memory,
    raw_inputs,
    reference,
    results,
    run,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from qlakernels import backends

pytestmark = pytest.mark.gpu


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (128, 128), (96, 192)])
@pytest.mark.parametrize("batch", [1, 2])
def test_slices_of_one_projection(batch, key_dim, value_dim):
    """As a model hands them over; the gates are slices of another one. Read in place, with the bits of copies."""
    key_heads, value_heads = 2, 4
    inputs = raw_inputs(
        tokens=333, batch=batch, key_heads=key_heads, value_heads=value_heads, key_dim=key_dim, value_dim=value_dim
    )
    cotangents = make_cotangents(inputs, batch)
    projection = torch.cat([inputs[name].flatten(2) for name in "qkv"], -1).requires_grad_()
    gates = torch.cat([inputs["g"], inputs["beta"]], -1).requires_grad_()
    sizes = [key_heads * key_dim, key_heads * key_dim, value_heads * value_dim]
    q, k, v = (
        x.unflatten(-1, (-1, dim))
        for x, dim in zip(projection.split(sizes, -1), (key_dim, key_dim, value_dim), strict=True)
    )
    g, beta = gates.split(value_heads, -1)
    slices = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    assert not any(x.is_contiguous() for x in slices.values())
    poison_free_memory()
    o, final_state = run(inputs | slices, output_final_state=True, **ALL_OPTIONS)
    poison_free_memory()
    d_projection, d_gates = torch.autograd.grad(
        [o, final_state], [projection, gates], [cotangents["o"], cotangents["final_state"]]
    )
    gradients = [*d_projection.split(sizes, -1), *d_gates.split(value_heads, -1)]
    gradients = [x.reshape(inputs[name].shape) for name, x in zip(slices, gradients, strict=True)]
    got = results(o, final_state, slices, gradients)
    expected = reference(inputs, cotangents, **ALL_OPTIONS)
    judge(got, {name: expected[name] for name in got}, sizes=natural_sizes(inputs, expected, True))
    copies = evaluate(inputs, cotangents, **ALL_OPTIONS)
    assert_same_bits(got, {name: copies[name] for name in got})


def test_heads_before_tokens():
    """[B, H, T, D] transposed: the last dimension is contiguous, tokens lie closer than heads."""
    inputs = make_inputs(200, batch=2)
    cotangents = make_cotangents(inputs, 2)
    expected = evaluate(inputs, cotangents)
    for name in ("q", "k", "v"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    cotangents["o"] = cotangents["o"].transpose(1, 2).contiguous().transpose(1, 2)
    assert_same_bits(evaluate(inputs, cotangents), expected)


def test_gradients_are_laid_out_as_their_inputs():
    inputs = make_inputs(200)
    cotangents = make_cotangents(inputs, 1)
    expected = evaluate(inputs, cotangents)
    for name in ("q", "k", "v"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert_same_bits(evaluate(inputs, cotangents), expected)
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("q", "k", "v")}
    o, _ = run(inputs | leaves)
    for x, gradient in zip(leaves.values(), torch.autograd.grad(o, leaves.values(), cotangents["o"]), strict=True):
        assert gradient.stride()[1:] == x.stride()[1:] and not gradient.is_contiguous()


def test_gradients_that_arrive_expanded():
    """Those of a sum: every stride is 0."""
    inputs = make_inputs(lengths=MIX)
    cotangents = make_cotangents(inputs, len(MIX))
    expanded = {name: torch.ones((), dtype=x.dtype, device=x.device).expand_as(x) for name, x in cotangents.items()}
    whole = {name: torch.ones_like(x) for name, x in cotangents.items()}
    options = {"cu_seqlens": boundaries(MIX)}
    assert_same_bits(evaluate(inputs, expanded, **options), evaluate(inputs, whole, **options))


def strided_last(x):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def misaligned(x):
    """The same numbers, beginning 2 bytes after a boundary of 16."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def rows_of_odd_bytes(x):
    """As slices of a projection whose rows are no multiple of 16 bytes."""
    wide = torch.cat([x.flatten(2), x.new_zeros(*x.shape[:2], 3)], -1)
    return wide[..., :-3].unflatten(-1, x.shape[2:])


def cut_from_longer_rows(x):
    return torch.cat([x, torch.full_like(x[:, :7], float("nan"))], 1)[:, :-7]


ODD_LAYOUTS = {
    "q not contiguous over K": ("q", strided_last),
    "k not contiguous over K": ("k", strided_last),
    "v not contiguous over V": ("v", strided_last),
    "q misaligned": ("q", misaligned),
    "v misaligned": ("v", misaligned),
    "k in rows of odd bytes": ("k", rows_of_odd_bytes),
    "v in rows of odd bytes": ("v", rows_of_odd_bytes),
    "q cut from longer rows": ("q", cut_from_longer_rows),
    "v cut from longer rows": ("v", cut_from_longer_rows),
    "g cut from longer rows": ("g", cut_from_longer_rows),
    "g by heads": ("g", strided_last),
    "beta by heads": ("beta", strided_last),
    "initial_state transposed": ("initial_state", strided_last),
    "initial_state in bfloat16": ("initial_state", torch.Tensor.bfloat16),
    "g in bfloat16": ("g", torch.Tensor.bfloat16),
}


@pytest.mark.parametrize(("name", "change"), ODD_LAYOUTS.values(), ids=ODD_LAYOUTS.keys())
def test_an_odd_layout_is_right_or_refused(name, change):
    """A copy is allowed here, and so is a ValueError that names the argument: a wrong result is not."""
    inputs = make_inputs(100, batch=2)
    inputs[name] = change(inputs[name])
    cotangents = make_cotangents(inputs, 2)
    leaves = {key: x.detach().requires_grad_() for key, x in inputs.items()}
    poison_free_memory()
    try:
        o, final_state = run(leaves, output_final_state=True)
    except ValueError as error:
        assert name in str(error)
        return
    poison_free_memory()
    gradients = torch.autograd.grad([o, final_state], list(leaves.values()), list(cotangents.values()))
    expected = reference(inputs, cotangents)
    judge(results(o, final_state, inputs, gradients), expected, sizes=natural_sizes(inputs, expected, True))


def test_offsets_beyond_two_to_the_31():
    """The last of many documents lies where an int32 offset has wrapped around."""
    if torch.cuda.mem_get_info()[0] < 75e9:
        pytest.skip("needs 75 GB of GPU memory for itself: run it alone")
    heads, length, documents = 32, 8320, 64
    total = length * documents
    assert total * heads * 128 > 2**31
    last = make_inputs(length, key_heads=1, value_heads=heads, state=False)
    cotangents = make_cotangents(last, 1)
    alone = evaluate(last, cotangents)
    before = total - length
    leaves = {}
    for name, x in last.items():
        leaves[name] = x.new_zeros(1, total, *x.shape[2:])
        leaves[name][:, before:] = x
        leaves[name].requires_grad_()
    o, _ = run(leaves, cu_seqlens=boundaries([length] * documents))
    judge({"o": o[:, before:]}, {"o": alone["o"]}, label="last document, ")
    assert o[:, :before].abs().max() == 0
    d_o = torch.zeros_like(o)
    d_o[:, before:] = cotangents["o"]
    zero = torch.zeros_like(cotangents["final_state"])
    alone = evaluate(last, {"o": cotangents["o"], "final_state": zero})
    gradients = torch.autograd.grad(o, list(leaves.values()), d_o)
    got = {f"d{name}": x[:, before:] for name, x in zip(leaves, gradients, strict=True)}
    judge(got, {name: alone[name] for name in got}, label="last document, ")


# ---------------------------------------------------------------- repeats


@pytest.mark.parametrize(
    ("shape", "lengths"),
    [
        ({"key_heads": 8, "value_heads": 16}, MIX),
        ({"key_heads": 1, "value_heads": 2, "tokens": 16384}, None),
        ({"key_heads": 4, "value_heads": 16, "tokens": 1000, "batch": 4}, None),
        ({"key_heads": 2, "value_heads": 2, "key_dim": 96, "value_dim": 192}, MIX),
    ],
    ids=["packed", "segments", "batch", "96-192"],
)
def test_a_hundred_repeats_have_the_same_bits(shape, lengths):
    inputs = raw_inputs(lengths=lengths, **shape)
    cotangents = make_cotangents(inputs, len(lengths) if lengths else len(inputs["v"]))
    options = ALL_OPTIONS | ({"cu_seqlens": boundaries(lengths)} if lengths else {})
    first = evaluate(inputs, cotangents, **options)
    for _ in range(100):
        assert_same_bits(evaluate(inputs, cotangents, **options), first)


def test_no_wait_for_the_device():
    """Forward and backward enqueue and return, also with boundaries that only the device has."""
    inputs = raw_inputs(lengths=MIX)
    cotangents = make_cotangents(inputs, len(MIX))
    cu_seqlens = boundaries(MIX, torch.int64)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}

    def step():
        o, final_state = run(leaves, cu_seqlens=cu_seqlens, output_final_state=True, **ALL_OPTIONS)
        torch.autograd.grad([o, final_state], list(leaves.values()), list(cotangents.values()))

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------- with PyTorch


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_compiled_is_eager(packed):
    """One whole graph, for several lengths; the arithmetic around the operator is the same, and so are the bits."""
    torch._dynamo.reset()

    def function(inputs, cu_seqlens):
        inputs = inputs | {"q": inputs["q"] * 2, "v": inputs["v"].relu()}
        o, final_state = run(inputs, cu_seqlens=cu_seqlens, output_final_state=True, **ALL_OPTIONS)
        return o * 2, final_state

    compiled = torch.compile(function, fullgraph=True)
    for seed, lengths in enumerate([[200, 60], [1, 299], [640, 0]]):
        inputs = raw_inputs(**({"lengths": lengths} if packed else {"tokens": sum(lengths), "batch": 2}), seed=seed)
        cotangents = list(make_cotangents(inputs, 2).values())
        cu_seqlens = boundaries(lengths) if packed else None
        both = []
        for variant in (function, compiled):
            leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
            poison_free_memory()
            outputs = variant(leaves, cu_seqlens)
            poison_free_memory()
            both.append(results(*outputs, leaves, torch.autograd.grad(outputs, list(leaves.values()), cotangents)))
        assert_same_bits(both[1], both[0])


def test_compiled_without_gradients():
    torch._dynamo.reset()
    inputs = make_inputs(130, state=False)
    expected, _ = run(inputs)
    with torch.no_grad():
        o, final_state = torch.compile(run, fullgraph=True)(inputs)
    assert final_state is None
    judge({"o": o}, {"o": expected})


class RecordOperators(TorchDispatchMode):
    """Every call of one of our own operators, with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace not in ("aten", "prim", "prims", "profiler", "inductor"):
            copy = tree_map(lambda x: x.detach().clone() if isinstance(x, torch.Tensor) else x, (args, kwargs or {}))
            self.calls.append((function, *copy))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["plain", "all options"])
@pytest.mark.parametrize("lengths", [None, [70, 0, 30]], ids=["dense", "packed"])
def test_opcheck(lengths, options):
    """Schema, fake implementation and registered autograd of every operator that forward and backward go through."""
    inputs = (raw_inputs if options else make_inputs)(tokens=100, lengths=lengths)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    with RecordOperators() as forward:
        o, final_state = run(
            leaves, output_final_state=True, cu_seqlens=None if lengths is None else boundaries(lengths), **options
        )
    cotangents = make_cotangents(inputs, len(final_state))
    with RecordOperators() as backward:
        torch.autograd.grad([o, final_state], list(leaves.values()), list(cotangents.values()))
    assert forward.calls and backward.calls
    for function, args, kwargs in [*forward.calls, *backward.calls]:
        torch.library.opcheck(function, args, kwargs)
    # and with gradients, in the operators that the inputs enter
    names = set(inputs)
    for function, args, kwargs in forward.calls:
        schema = [argument.name for argument in function._schema.arguments]
        for name, x in [*zip(schema, args, strict=False), *kwargs.items()]:
            if name in names and isinstance(x, torch.Tensor):
                x.requires_grad_()
        torch.library.opcheck(function, args, kwargs)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    inputs = raw_inputs(lengths=MIX)
    cotangents = make_cotangents(inputs, len(MIX))
    expected = evaluate(inputs, cotangents, cu_seqlens=boundaries(MIX), **ALL_OPTIONS)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}

    def function(*values):
        return run(
            dict(zip(leaves, values, strict=True)), cu_seqlens=boundaries(MIX), output_final_state=True, **ALL_OPTIONS
        )

    outputs = checkpoint(function, *leaves.values(), use_reentrant=use_reentrant)
    torch.autograd.backward(outputs, list(cotangents.values()))
    assert_same_bits(results(*outputs, leaves, [x.grad for x in leaves.values()]), expected)


class Layer(torch.nn.Module):
    """The operator with its two parameters and a projection."""

    def __init__(self, heads, width):
        super().__init__()
        self.A_log, self.dt_bias = (torch.nn.Parameter(torch.zeros(heads)) for _ in range(2))
        self.v_proj = torch.nn.Linear(width, width, bias=False, dtype=torch.bfloat16)

    def forward(self, inputs):
        inputs = inputs | {"v": self.v_proj(inputs["v"]), "A_log": self.A_log, "dt_bias": self.dt_bias}
        return run(inputs, **ALL_OPTIONS)[0]


def test_functional_call():
    inputs = raw_inputs(tokens=200)
    layer = Layer(4, 128).to(hopper_helpers.DEVICE)
    weight = torch.randn(128, 128).to(layer.v_proj.weight) / 128**0.5
    others = {"A_log": inputs["A_log"] - 1, "dt_bias": inputs["dt_bias"], "v_proj.weight": weight}
    others = {name: x.clone().requires_grad_() for name, x in others.items()}
    cotangent = make_cotangents(inputs, 1)["o"]
    o = torch.func.functional_call(layer, others, (inputs,))
    got = torch.autograd.grad(o, list(others.values()), cotangent)
    layer.load_state_dict(others)
    o_own = layer(inputs)
    assert torch.equal(o, o_own)
    own = torch.autograd.grad(o_own, [dict(layer.named_parameters())[name] for name in others], cotangent)
    for name, x, y in zip(others, got, own, strict=True):
        assert x.abs().max() > 0
        assert_same_bits({name: x}, {name: y})


@pytest.mark.parametrize("shape", [{}, {"key_heads": 1, "value_heads": 2}], ids=["some heads", "few heads"])
@pytest.mark.parametrize("tokens", [640, 8192])
def test_cuda_graph_replayed_with_other_boundaries(tokens, shape):
    """Captured once, forward and backward; then other numbers and other documents in the same places."""
    packings = [
        [tokens // 4] * 4,
        [0, tokens, 0, 0],
        [1, 65, tokens - 130, 64],
        [tokens - 1, 0, 1, 0],
        [63, 64, 0, tokens - 127],
    ]
    inputs = raw_inputs(lengths=packings[0], decay=0.05, **shape)
    cotangents = make_cotangents(inputs, 4)
    cu_seqlens = boundaries(packings[0])
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}

    def step():
        o, final_state = run(leaves, cu_seqlens=cu_seqlens, output_final_state=True, **ALL_OPTIONS)
        gradients = torch.autograd.grad([o, final_state], list(leaves.values()), list(cotangents.values()))
        return results(o, final_state, leaves, gradients)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed, lengths in enumerate([*packings[1:], packings[0]]):
        new = raw_inputs(lengths=lengths, decay=0.05, seed=seed, **shape)
        with torch.no_grad():
            for name, x in new.items():
                leaves[name].copy_(x)
        for name, x in make_cotangents(new, 4, seed).items():
            cotangents[name].copy_(x)
        cu_seqlens.copy_(boundaries(lengths))
        poison_free_memory()
        graph.replay()
        got = {name: x.clone() for name, x in captured.items()}
        expected = evaluate(new, cotangents, cu_seqlens=boundaries(lengths), **ALL_OPTIONS)
        assert_same_bits(got, expected)
        exact = reference(new, cotangents, cu_seqlens=boundaries(lengths), **ALL_OPTIONS)
        judge(got, exact, sizes=natural_sizes(new, exact, True))


# ---------------------------------------------------------------- bad input


def test_chosen_by_auto(caplog, monkeypatch):
    monkeypatch.setattr(backends, "_decided", {})
    monkeypatch.setattr(backends, "_said", set())
    inputs = make_inputs(10)
    with caplog.at_level("INFO", logger="qlakernels"):
        run(inputs)
        hopper_helpers.chunk_gated_delta_rule(**inputs)
    lines = [record.getMessage() for record in caplog.records if ": backend " in record.getMessage()]
    assert lines[0] == "gated_delta_rule: backend tilelang on cuda (asked for)"
    assert lines[1:] == ["gated_delta_rule: backend tilelang on cuda (first choice)"]


def of(shape, dtype=torch.bfloat16, device=None):
    return torch.zeros(shape, dtype=dtype, device=device or hopper_helpers.DEVICE)


BAD_CALLS = {
    "k in float16": (lambda: {"k": of((1, 6, 2, 128), torch.float16)}, ["k is torch.float16", "q is torch.bfloat16"]),
    "v in float32": (lambda: {"v": of((1, 6, 4, 128), torch.float32)}, ["v is torch.float32", "q is torch.bfloat16"]),
    "all in float32": (
        lambda: {name: of((1, 6, heads, 128), torch.float32) for name, heads in (("q", 2), ("k", 2), ("v", 4))},
        ["float32", "bfloat16", "float16"],
    ),
    "K of 80": (lambda: {"q": of((1, 6, 2, 80)), "k": of((1, 6, 2, 80))}, ["80", "64", "96", "128"]),
    "K of 256": (lambda: {"q": of((1, 6, 2, 256)), "k": of((1, 6, 2, 256))}, ["256", "64", "96", "128"]),
    "V of 80": (lambda: {"v": of((1, 6, 4, 80))}, ["80", "64", "96", "128", "192", "256"]),
    "five value heads": (lambda: {"v": of((1, 6, 5, 128))}, ["v has 5 heads", "multiple of the 2 heads"]),
    "a batch with cu_seqlens": (
        lambda: (
            {name: of((2, 6, heads, 128)) for name, heads in (("q", 2), ("k", 2), ("v", 4))}
            | {name: of((2, 6, 4), torch.float32) for name in ("g", "beta")}
            | {"cu_seqlens": boundaries([6])}
        ),
        ["batch is 2 with cu_seqlens"],
    ),
    "a late start": (lambda: both_boundaries([1, 6]), ["cu_seqlens starts at 1", "0"]),
    "a descent": (lambda: both_boundaries([0, 4, 3, 6]), ["cu_seqlens descends from 4 to 3"]),
    "an early end": (lambda: both_boundaries([0, 5]), ["cu_seqlens ends at 5", "6"]),
    "q on the CPU": (lambda: {"q": of((1, 6, 2, 128), device="cpu")}, ["cpu"]),
    "k on the CPU": (lambda: {"k": of((1, 6, 2, 128), device="cpu")}, ["k", "cpu", "cuda"]),
    "g on the CPU": (lambda: {"g": of((1, 6, 4), torch.float32, "cpu")}, ["g", "cpu", "cuda"]),
    "a state on the CPU": (
        lambda: {"initial_state": of((1, 4, 128, 128), torch.float32, "cpu")},
        ["initial_state", "cpu", "cuda"],
    ),
}


def both_boundaries(bounds):
    on_host = torch.tensor(bounds, dtype=torch.int32)
    return {"cu_seqlens": on_host.to(hopper_helpers.DEVICE), "cu_seqlens_cpu": on_host}


@pytest.mark.parametrize(("changes", "words"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_call(changes, words):
    inputs = make_inputs(6, state=False)
    with pytest.raises(ValueError) as error:
        run(inputs | changes())
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9)])
def test_a_gpu_that_is_too_old(capability, monkeypatch):
    monkeypatch.setattr(backends, "_decided", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, **__: capability)
    with pytest.raises(ValueError) as error:
        run(make_inputs(6, state=False))
    assert "backend='tilelang' of gated_delta_rule cannot run here" in str(error.value)
    assert "9.0" in str(error.value)
    assert f"{capability[0]}.{capability[1]}" in str(error.value) or str(capability) in str(error.value)


@pytest.mark.parametrize("bounds", [[1, 6, 100], [0, 70, 60, 100], [0, 60, 90], [0, 60, 110]], ids=str)
def test_bad_boundaries_that_only_the_device_has(bounds):
    """Seen on the device, without a wait, so not always at the call itself; by the next wait at the latest.

    In a process of its own: a GPU that has reported an error serves nobody after it.
    """
    tests = Path(__file__).parent
    script = f"""
import sys
sys.path[:0] = {[str(tests), str(tests.parent.parent / "kernels"), str(tests.parent.parent)]}
import torch
from hopper_helpers import make_inputs, run
run(make_inputs(100, state=False), cu_seqlens=torch.tensor({bounds}, dtype=torch.int32, device="cuda"))
torch.cuda.synchronize()
print("nobody noticed")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "nobody noticed" not in done.stdout
    assert "cu_seqlens" in done.stdout + done.stderr, done.stderr
