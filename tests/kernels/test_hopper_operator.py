"""The Hopper kernels' operators as PyTorch sees them, on the CPU: launches are recorded, and fill what they should.

What the kernels compute is tested on a GPU; here it is a stand-in that depends on the inputs.
"""

import pytest
import torch
import torch._dynamo.testing
from torch.library import opcheck

from qlakernels.gated_delta_rule.hopper import constants, operator
from qlakernels.gated_delta_rule.hopper.kernels import specialisations
from qlakernels.gated_delta_rule.hopper.sizes import GATE_TOKENS as TOKENS

OUTPUTS = {  # of each kernel: the places of its outputs among its arguments
    "boundaries": [1],
    "decay": [5],
    "reach": [2],
    **dict.fromkeys(("prepare", "prepare_reverse"), range(8, 11)),
    **dict.fromkeys(("segments", "segments_reverse"), range(8, 10)),
    "stitch": [4],
    "stitch_reverse": [4],
    "forward": range(10, 15),
    "reverse": [10, *range(12, 16)],
    "gradients": [11, *range(13, 17)],
    "gate_gradients": range(6, 9),
}
OPTIONS = {
    "scale": 0.1,
    "initial_state": None,
    "output_final_state": True,
    "cu_seqlens": None,
    "cu_seqlens_cpu": None,
    "use_qk_l2norm_in_kernel": True,
    "use_gate_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
    "allow_neg_eigval": True,
}


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """The names of the kernels launched, in order."""
    names = []

    def launching(name):
        def launch(*arguments):
            names.append(name)
            outputs = {arguments[i].data_ptr(): arguments[i] for i in OUTPUTS[name]}
            read = [x for x in arguments if isinstance(x, torch.Tensor) and x.data_ptr() not in outputs and x.numel()]
            for i, x in enumerate(outputs.values()):
                assert x.is_contiguous() or name in ("reverse", "gradients", "gate_gradients")
                x.fill_(i + sum(y.double().mean() for y in read))

        return launch

    def launchers(key_dim, value_dim, dtype, l2norm, gate, sigmoid, raw_dtype, beta_dtype, keep, part, cut):
        options = l2norm, gate, sigmoid, raw_dtype, beta_dtype
        return {name: launching(name) for name in specialisations(128, 128, dtype, *options, keep, part, cut)}

    monkeypatch.setattr(operator, "_launchers", launchers)
    monkeypatch.setattr(operator, "_multiprocessors", lambda device: 132)
    return names


def make_inputs(batch=2, tokens=70, groups=1, heads=2, dim=16, dtype=torch.bfloat16, requires_grad=True):
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=random).to(dtype)

    inputs = {"q": normal(batch, tokens, groups, dim), "k": normal(batch, tokens, groups, dim)}
    inputs |= {"v": normal(batch, tokens, heads, dim), "g": normal(batch, tokens, heads)}
    inputs |= {"beta": normal(batch, tokens, heads), "A_log": normal(heads).float(), "dt_bias": normal(heads).float()}
    return {name: x.requires_grad_(requires_grad) for name, x in inputs.items()}


PACKED = torch.tensor([0, 70, 70, 140], dtype=torch.int32)


def packed(inputs):
    return {name: x.detach().flatten(0, 1)[None] if x.dim() > 1 else x for name, x in inputs.items()}


def test_launches(launches):
    inputs = make_inputs(requires_grad=False)
    operator.run(**inputs, **OPTIONS)
    assert launches == ["forward"]
    launches.clear()
    operator.run(**packed(inputs), **OPTIONS | {"cu_seqlens": PACKED.long()})
    assert launches == ["boundaries", "forward"]


@pytest.mark.parametrize("l2norm", [True, False])
def test_launches_of_segments(l2norm, launches, monkeypatch):
    monkeypatch.setattr(operator, "LEAST_SEGMENT", 256)
    inputs = make_inputs(tokens=700)
    o, _ = operator.run(**inputs, **OPTIONS | {"use_qk_l2norm_in_kernel": l2norm})
    reach = ["decay", "reach"] if l2norm else ["reach"]
    assert launches == [*reach, "prepare", "segments", "stitch", "forward"]
    launches.clear()
    o.float().sum().backward()
    entered = [*reach, "prepare_reverse", "segments_reverse", "stitch_reverse"]
    assert launches == [*entered, "reverse", "gradients", "gate_gradients"]
    assert all(x.grad.isfinite().all() for x in inputs.values())


@pytest.mark.parametrize(
    ("shape", "documents", "plan"),
    [
        ((8, 4096, 32, 128), None, (128, 8, 0, 0)),  # enough rows
        ((8, 4096, 32, 64), None, (64, 8, 0, 0)),
        ((1, 32768, 32, 128), None, (128, 5, 8192, 2048)),
        ((1, 32768, 8, 128), None, (128, 17, 2048, 2048)),
        ((1, 32768, 8, 256), None, (128, 9, 4096, 2048)),  # two blocks to a head
        ((1, 2**20, 32, 128), None, (128, 5, 262144, 8192)),
        ((2, 8192, 32, 128), None, (64, 2, 0, 0)),  # two segments are too few
        ((2, 8192, 8, 128), None, (128, 18, 1024, 1024)),
        ((1, 1024, 8, 128), None, (64, 1, 0, 0)),
        ((1, 1025, 8, 128), None, (128, 2, 1024, 1024)),
        ((1, 32768, 32, 128), 16, (128, 16, 0, 0)),  # enough documents, whatever their lengths
        ((1, 32768, 32, 128), 2, (128, 6, 8192, 2048)),  # one of them may be nearly all
        ((1, 32768, 8, 128), 16, (128, 32, 2048, 2048)),
        ((1, 32768, 8, 128), 100, (128, 100, 0, 0)),
    ],
)
def test_plan(shape, documents, plan):
    batch, tokens, heads, value_dim = shape
    q = torch.empty(batch, tokens, 1, 1)
    cu_seqlens = None if documents is None else torch.empty(documents + 1, dtype=torch.int32)
    assert operator._plan(q, cu_seqlens, heads, value_dim) == plan


def test_too_many_documents():
    inputs = {name: x.detach() for name, x in packed(make_inputs(batch=1)).items()}
    cu_seqlens = torch.zeros(operator.MOST_DOCUMENTS + 2, dtype=torch.int32)
    cu_seqlens[-1] = 70
    with pytest.raises(ValueError, match=r"^cu_seqlens holds a number of documents of 65536; .* takes 65535 in a call"):
        operator.run(**inputs, **OPTIONS | {"cu_seqlens": cu_seqlens})


@pytest.mark.parametrize("gates", [True, False])
def test_gradients(gates, launches):
    inputs = make_inputs()
    options = OPTIONS
    if not gates:
        off = ("use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval")
        options = OPTIONS | dict.fromkeys(off, False)
        inputs["A_log"], inputs["dt_bias"] = None, None
    o, final_state = operator.run(**inputs, **options)
    assert o.shape == inputs["v"].shape and final_state.shape == (2, 2, 16, 16)
    launches.clear()
    wanted = [x for x in inputs.values() if x is not None]
    gradients = torch.autograd.grad([o, final_state], wanted, [torch.ones_like(o), torch.ones_like(final_state)])
    assert launches == ["reverse", "gradients", *(["gate_gradients"] if gates else [])]
    for x, gradient in zip(wanted, gradients, strict=True):
        assert gradient.shape == x.shape and gradient.dtype == x.dtype and gradient.isfinite().all()
    if gates:  # both sums over the blocks of tokens
        assert gradients[-1].unique().numel() == 1 and -(-140 // TOKENS) == 3


def test_a_loss_of_the_final_state_alone():
    inputs = make_inputs()
    _, final_state = operator.run(**inputs, **OPTIONS)
    assert all(x is not None for x in torch.autograd.grad(final_state.sum(), list(inputs.values())))


def test_no_second_gradients():
    inputs = make_inputs()
    o, _ = operator.run(**inputs, **OPTIONS)
    (dq,) = torch.autograd.grad(o.float().sum(), inputs["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second gradients"):
        dq.float().sum().backward()


def test_inference_before_training():
    """What inference leaves behind can be saved for a backward."""
    constants._made.clear()
    inputs = make_inputs(tokens=71)
    with torch.inference_mode():
        operator.run(**inputs, **OPTIONS)
    test_a_loss_of_the_final_state_alone()
    o, _ = operator.run(**inputs, **OPTIONS)
    o.float().sum().backward()


@pytest.mark.parametrize("cu_seqlens", [None, PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize("state", [False, True])
def test_opcheck(cu_seqlens, state):
    inputs = make_inputs()
    if cu_seqlens is not None:
        inputs = {name: x.requires_grad_() for name, x in packed(inputs).items()}
    documents = 2 if cu_seqlens is None else 3
    initial_state = torch.randn(documents, 2, 16, 16).requires_grad_() if state else None
    q, k, v, g, beta, A_log, dt_bias = inputs.values()
    flags = (0.1, True, True, True, True, True)
    forward = (q, k, v, g, beta, cu_seqlens, A_log, dt_bias, initial_state, *flags)
    opcheck(operator._forward_op, (*forward, True))
    none = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in forward)
    opcheck(operator._forward_op, (*none, False))
    o, final_state, *kept, order = operator._forward_op(*none, True)
    q, k, v, g, beta, _, A_log, dt_bias, *_ = none
    backward = (q, k, g, beta, *kept, torch.ones_like(o), final_state, cu_seqlens, order, A_log, dt_bias)
    for strides in (v.stride(), heads_first(v).stride()):
        opcheck(operator._backward_op, (*backward, state, 0.1, True, True, True, True, strides))


def heads_first(x):
    """The same [B, T, H, D], in memory as [H, B, T, D]."""
    return x.detach().permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


def test_gradients_are_laid_out_as_what_they_are_of():
    inputs = make_inputs(groups=2)
    for name in ("k", "v"):
        inputs[name] = heads_first(inputs[name]).requires_grad_()
    sides = torch.stack([inputs["q"], inputs["q"]], dim=3)  # every other number: no layout for a gradient
    q = sides[..., 0, :]
    o, _ = operator.run(**inputs | {"q": q}, **OPTIONS)
    dq, dk, dv = torch.autograd.grad(o.float().sum(), [q, inputs["k"], inputs["v"]])
    assert dq.is_contiguous() and dk.stride() == inputs["k"].stride() and dv.stride() == inputs["v"].stride()


@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
def test_compiled_is_eager(is_packed):
    torch._dynamo.reset()

    def function(inputs, cu_seqlens):
        inputs = inputs | {"v": inputs["v"] * 2}
        o, final_state = operator.run(**inputs, **OPTIONS | {"cu_seqlens": cu_seqlens})
        return o * 2, final_state

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for tokens in (70, 129, 64):
        both = []
        for variant in (function, compiled):
            inputs = make_inputs(tokens=tokens)
            cu_seqlens = None
            if is_packed:
                inputs = {name: x.requires_grad_() for name, x in packed(inputs).items()}
                cu_seqlens = torch.tensor([0, 3, 2 * tokens], dtype=torch.int32)
            o, final_state = variant(inputs, cu_seqlens)
            cotangents = [torch.ones_like(o), torch.ones_like(final_state)]
            both.append([o, final_state, *torch.autograd.grad([o, final_state], list(inputs.values()), cotangents)])
        for eager, other in zip(*both, strict=True):
            assert torch.equal(eager, other)
    with torch.no_grad():
        inputs = make_inputs(requires_grad=False)
        assert torch.equal(compiled(inputs, None)[0], function(inputs, None)[0])


def test_one_trace_for_any_number_of_documents():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def function(inputs, cu_seqlens):
        return operator.run(**inputs, **OPTIONS | {"cu_seqlens": cu_seqlens})[0]

    for documents in (3, 4, 5, 8, 9, 17):
        inputs = {name: x.requires_grad_() for name, x in packed(make_inputs()).items()}
        function(inputs, torch.linspace(0, 140, documents + 1).int()).float().sum().backward()
    assert counter.frame_count == 2  # the first number is taken for a constant, every other is a variable


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    inputs = make_inputs()

    def function(*values):
        return operator.run(**dict(zip(inputs, values, strict=True)), **OPTIONS)[0].float()

    o = torch.utils.checkpoint.checkpoint(function, *inputs.values(), use_reentrant=use_reentrant)
    expected = torch.autograd.grad(function(*inputs.values()).sum(), list(inputs.values()))
    o.sum().backward()
    assert all(torch.equal(x.grad, y) for x, y in zip(inputs.values(), expected, strict=True))
