"""The norm of a residual stream: the plain form against autograd, the kernels on a CPU, their resources, the operators.

The kernels run on a CPU twice: a row a thread, and as they are, lanes, shuffles and barriers, under an emulator.
"""

import dataclasses
import shutil

import emulated
import pytest
import torch
import torch._dynamo.testing
from on_cpu import compile_for_cpu
from torch.library import opcheck

from qlakernels import backends
from qlakernels.compiling import kernel
from qlakernels.gated_delta_rule.hopper.resources import resources
from qlakernels.residual_norm import add_rms_norm, normed_product
from qlakernels.residual_norm.api import OPERATOR
from qlakernels.residual_norm.hopper import backward, forward, operator, rows, sizes
from qlakernels.residual_norm.hopper.kernels import specialisations

EPS = 1e-2  # not small beside the mean square: it shows where it is
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
NAN = float("nan")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
needs_gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="kernels for the CPU need g++")


def draw(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def formula(x, delta, weight, eps, offset, dtype=torch.float64):
    """In float64, the total rounded to `dtype` in the value and not in the gradient."""
    total = x if delta is None else x + delta
    total = total + (total.to(dtype).double() - total).detach()
    return total, total * (total.square().mean(-1, keepdim=True) + eps).rsqrt() * (offset + weight)


def gradients_of(outputs, leaves, cotangents, used=("total", "normed")):
    """Of the outputs that are used; zeros where nothing arrives."""
    pairs = [(y, dy) for name, y, dy in zip(("total", "normed"), outputs, cotangents, strict=True) if name in used]
    ys, dys = zip(*((y, dy.to(y.dtype)) for y, dy in pairs if y.requires_grad), strict=True)
    return torch.autograd.grad(ys, leaves, dys, allow_unused=True, materialize_grads=True)


def inputs(*shape, dtype=torch.float32, weight_dtype=torch.float32, with_delta=True, device="cpu"):
    """x, delta or None, weight, all of them leaves, and gradients of total and normed."""
    x, delta, *cotangents = (draw(*shape, seed=seed, dtype=dtype, device=device) for seed in range(4))
    weight = draw(shape[-1], seed=4, dtype=weight_dtype, device=device).requires_grad_()
    return x.requires_grad_(), delta.requires_grad_() if with_delta else None, weight, cotangents


def check(run, x, delta, weight, cotangents, eps=EPS, offset=1.0, used=("total", "normed")):
    """run(x, delta, weight, eps, offset), outputs and gradients, against the formula in float64 on the same numbers, as
    close as a number rounded once can be; what it returned and its gradients."""
    given = [x, delta, weight]
    leaves = [t for t in given if t is not None]
    outputs = run(*given, eps, offset)
    gradients = gradients_of(outputs, leaves, cotangents, used)
    doubles = [None if t is None else t.detach().double().requires_grad_() for t in given]
    expected = formula(*doubles, eps, offset, x.dtype)
    wanted = gradients_of(expected, [t for t in doubles if t is not None], cotangents, used)
    unit = UNIT.get(x.dtype, 0)
    total = x if delta is None else x + delta
    assert torch.equal(outputs[0], total) and all(y.dtype == x.dtype and y.shape == x.shape for y in outputs)
    for got, right in zip((outputs[1], *gradients[:-1]), (expected[1], *wanted[:-1]), strict=True):
        small = 1e-5 * right.abs().max().item() if right.numel() else 0
        torch.testing.assert_close(got.double(), right, rtol=unit + 1e-5, atol=small)
    for got, leaf in zip(gradients, leaves, strict=True):
        assert got.dtype == leaf.dtype and got.shape == leaf.shape
    unit = UNIT.get(weight.dtype, 0) + 1e-5
    assert (gradients[-1].double() - wanted[-1]).norm() <= unit * wanted[-1].norm()
    return [*outputs, *gradients]


USED = [("total", "normed"), ("total",), ("normed",)]


@pytest.mark.parametrize("used", USED, ids="-".join)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("with_delta", [True, False])
def test_values_and_gradients(with_delta, offset, used):
    for shape in ((7, 8), (2, 5, 3, 24)):
        x, delta, weight, cotangents = inputs(*shape, with_delta=with_delta)
        if used == ("total",) and not with_delta:
            assert add_rms_norm(x, None, weight, EPS, offset)[0] is x
        else:
            check(add_rms_norm, x, delta, weight, cotangents, offset=offset, used=used)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_norm_of_transformers(dtype):
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

    x, delta, weight, _ = inputs(50, 32, dtype=dtype)
    norm = Qwen3NextRMSNorm(32, eps=1e-6)
    norm.weight.data = weight.detach()
    for given in (delta, None):
        total, normed = add_rms_norm(x, given, weight, 1e-6, offset=1.0)
        assert total is x if given is None else torch.equal(total, x + delta)
        expected = norm(total)
        assert normed.dtype == expected.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(normed, expected)
        else:
            assert torch.equal(normed, expected)


@pytest.mark.parametrize("frozen", [(), (2,), (3, 4)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("with_delta", [True, False])
def test_a_product_behind_the_norm(with_delta, offset, frozen):
    """As by autograd, with the total used besides; x, delta, the norm's weight, two weights of products."""
    shapes = [(2, 5, 24), (2, 5, 24), (24,), (7, 24), (6, 24)]
    leaves = [draw(*shape, seed=seed).requires_grad_(seed not in frozen) for seed, shape in enumerate(shapes)]
    if not with_delta:
        leaves[1] = None
    x, delta, norm_weight, *weights = leaves
    cast = torch.cat([weight.detach() for weight in weights] + [torch.zeros(3, 24)])
    got = normed_product(x, delta, norm_weight, EPS, tuple(weights), cast, offset)
    total, y = formula(*(None if t is None else t.double() for t in leaves[:3]), EPS, offset, torch.float32)
    expected = total, torch.cat([y @ weight.double().T for weight in weights] + [torch.zeros(2, 5, 3)], -1)
    cotangents = [draw(*y.shape, seed=9) for y in expected]
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-5)
    gradients = (
        torch.autograd.grad(ys, wanted, [dy.to(y.dtype) for y, dy in zip(ys, cotangents, strict=True)])
        for ys in (got, expected)
    )
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_product_keeps_no_normed_rows():
    x, delta, norm_weight, _ = inputs(5, 24, dtype=torch.bfloat16)
    weight, kept = draw(8, 24, seed=7).requires_grad_(), []
    cast = weight.detach().bfloat16()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        total, product = normed_product(x, delta, norm_weight, EPS, (weight,), cast)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (total, norm_weight, cast)}
    gradients = torch.autograd.grad(product.float().sum(), [weight, norm_weight, x])
    assert [g.dtype for g in gradients] == [torch.float32, torch.float32, torch.bfloat16]


def test_what_does_not_fit():
    x, weight = draw(3, 8), draw(8)
    with pytest.raises(ValueError, match=r"weight has shape \[4\], x \[3, 8\]"):
        add_rms_norm(x, None, weight[:4], EPS)
    for delta in (draw(1, 8), draw(3, 8).bfloat16()):
        with pytest.raises(ValueError, match=r"delta is .* give one like x"):
            add_rms_norm(x, delta, weight, EPS)


def test_what_is_refused(monkeypatch):
    """Where the GPU would do."""
    monkeypatch.setattr("qlakernels.residual_norm.api.refused_by_hopper", lambda call: None)
    for dim in (12, 8200):
        with pytest.raises(backends.BackendRefused, match=f"takes D a multiple of 8 up to 8192, not {dim}"):
            add_rms_norm(draw(2, dim), None, draw(dim), EPS, backend="tilelang")


def test_the_plain_form_compiled():
    torch._dynamo.reset()
    x, delta, weight, cotangents = inputs(2, 5, 24, dtype=torch.bfloat16)

    def function(x, delta, weight):
        total, normed = add_rms_norm(x * 2, delta, weight, EPS, 1.0)
        return total, normed * 2

    eager = function(x, delta, weight)  # the decision is logged, which a trace cannot
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(x, delta, weight)
    for one, other in zip(eager, compiled, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(*(gradients_of(ys, [x, delta, weight], cotangents) for ys in (eager, compiled)), strict=True):
        assert torch.equal(one, other)


# The kernels.


def plain_gradients(d_normed, d_total, total, weight, eps, offset):
    """By hand: below autograd, where an operator runs, nothing is recorded."""
    r = (total.square().mean(-1, keepdim=True) + eps).rsqrt()
    n, a = total * r, d_normed * (offset + weight)
    d = r * (a - n * (a * n).mean(-1, keepdim=True))
    return d if d_total is None else d + d_total, (d_normed * n).flatten(0, -2).sum(0)


@needs_gcc
@pytest.mark.parametrize(("residual", "with_normed"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("dim", [8, 24])
def test_arithmetic_on_a_cpu(dim, residual, with_normed, monkeypatch):
    """In float32, a block of one thread, which has a row for itself."""
    for module in (sizes, rows, forward, backward):
        monkeypatch.setattr(module, "PIECE", dim)
    monkeypatch.setattr(sizes, "LEAST_THREADS", 1)
    options = dim, "float32", "float32", residual
    run_forward = compile_for_cpu(forward.forward_kernel, *options, monkeypatch=monkeypatch)
    run_backward = compile_for_cpu(backward.backward_kernel, *options, with_normed, monkeypatch=monkeypatch)
    for size, blocks, offset in ((1, 1, 0.0), (4, 2, 1.0), (13, 3, 1.0)):
        x, delta, d_total, d_normed = (draw(size, dim, seed=seed) for seed in range(4))
        weight = draw(dim, seed=4)
        if not residual:
            delta, d_total = torch.full_like(x, NAN), torch.full_like(x, NAN)
        total, normed, d = (torch.full((size * dim,), NAN) for _ in range(3))
        sums = torch.full((blocks, dim), NAN)
        run_forward(x.flatten(), delta.flatten(), weight, total, normed, size, EPS, offset)
        right, expected = formula(x.double(), delta.double() if residual else None, weight.double(), EPS, offset)
        if residual:
            assert torch.equal(total.view_as(x), x + delta)
        else:
            assert total.isnan().all()
        torch.testing.assert_close(normed.view_as(x), expected.float())
        right = right.float()
        again = torch.full_like(normed, NAN)
        given = (t.flatten() for t in (d_normed, d_total, x + delta if residual else x))
        run_backward(*given, weight, d, again, sums, size, EPS, offset)
        assert torch.equal(again, normed) if with_normed else again.isnan().all()
        wanted = plain_gradients(
            *(t.double() for t in (d_normed, d_total if residual else torch.zeros_like(x), right, weight)), EPS, offset
        )
        torch.testing.assert_close(d.view_as(x), wanted[0].float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sums.sum(0), wanted[1].float(), rtol=1e-5, atol=1e-5)


def emulated_launchers(dim, dtype, weight_dtype, residual, folder):
    """As the operator's. What is written is NaN before; behind all tensors lie rows that are NaN and stay it."""
    keys = specialisations(dim, name_of(dtype), name_of(weight_dtype), residual, True)
    run = {name: emulated.emulate(key, sizes.threads_of(dim), folder) for name, key in keys.items()}
    behind = 64 * dim

    def call(name, grid, written, given):
        wide = {
            name: torch.cat([t.flatten(), torch.full((behind,), NAN, dtype=t.dtype)])
            for name, t in given.items()
            if isinstance(t, torch.Tensor)
        }
        for tensor in written:
            wide[tensor].fill_(NAN)
        run[name](grid, **(given | wide))
        for tensor in written:
            assert wide[tensor][-behind:].isnan().all()
            given[tensor].copy_(wide[tensor][:-behind].view_as(given[tensor]))

    def forward(*arguments):
        names = "x", "delta", "weight", "total", "normed", "rows", "eps", "offset"
        given = dict(zip(names, arguments, strict=True))
        rows_of_a_block = sizes.batch_of("add" if residual else "norm", dim) * sizes.abreast_of(dim)
        call("forward", -(-given["rows"] // rows_of_a_block), ("total", "normed") if residual else ("normed",), given)

    def backward(*arguments):
        names = "d_normed", "d_total", "total", "weight", "d", "normed", "sums", "rows", "eps", "offset"
        given = dict(zip(names, arguments, strict=True))
        blocks = given["sums"].shape[0]
        call("backward", blocks, ("d", "sums"), given | {"blocks": blocks})

    return {"forward": forward, "backward": backward}


@needs_nvcc
@pytest.mark.parametrize(
    ("dim", "dtype", "weight_dtype", "residual", "numbers_of_rows"),
    [
        (72, torch.bfloat16, torch.bfloat16, True, (1, 7, 70)),  # two rows a warp, some lanes without a piece
        (512, torch.float16, torch.float32, False, (1, 25)),  # two rows a block, two warps each
        (2560, torch.bfloat16, torch.float32, True, (1, 2, 11)),  # ten warps
    ],
    ids=str,
)
def test_kernels_on_a_cpu(dim, dtype, weight_dtype, residual, numbers_of_rows, monkeypatch, tmp_path):
    monkeypatch.setattr(emulated, "BEFORE", f"{emulated.BEFORE}using uchar = unsigned char;\n")
    made = emulated_launchers(dim, dtype, weight_dtype, residual, tmp_path)
    monkeypatch.setattr(operator, "_launchers", lambda *_: made)
    monkeypatch.setattr(operator, "grid_of", lambda rows, dim: min(2, rows))
    for size in numbers_of_rows:
        x, delta, weight, cotangents = inputs(size, dim, dtype=dtype, weight_dtype=weight_dtype, with_delta=residual)
        used = ("total", "normed") if residual else ("normed",)
        check(operator.run, x, delta, weight, cotangents, used=used)


@needs_nvcc
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dim", [2048, 5120])
@pytest.mark.parametrize("name", ["forward", "backward", "backward and normed"])
def test_resources(name, dim, residual):
    name, _, with_normed = name.partition(" and ")
    key = specialisations(dim, "bfloat16", "float32", residual, True, bool(with_normed))[name]
    found = resources(key)
    kernel_name = "backward" if name == "backward" else "add" if residual else "norm"
    assert found.spilled == 0 and found.shared < 2**10
    assert 0 < found.registers * sizes.threads_of(dim) * sizes.blocks_of(kernel_name, dim) <= 2**16
    source = kernel(key).get_kernel_source()
    read = ["x", "delta"] if name == "forward" else ["d_normed", "total", "d_total"]
    written = ["normed", "total"] if name == "forward" else ["d"]
    if not residual:
        read, written = [x for x in read if x not in ("delta", "d_total")], written[:1]
    if with_normed:
        written.append("normed")
    for tensor in read:
        assert source.count(f"= *(uint4*)({tensor} + ") == (1 if name == "forward" else 2)
    for tensor in written:
        assert source.count(f"  *(uint4*)({tensor} + ") == 1
    assert source.count("__syncthreads()") == 1
    assert name == "forward" or source.count("(turn % 2)") == 2  # what makes one barrier enough


@needs_nvcc
def test_rows_abreast_wait_for_each_other():
    """Which the emulator would not notice: sums of weights may lie where those of rows did."""
    source = kernel(specialisations(512, "float16", "float32", False, True)["backward"]).get_kernel_source()
    assert source.count("__syncthreads()") == 3
    uses = [part.count("*)dw_parts)") for part in source.rsplit("__syncthreads()", 2)]
    assert uses == [0, 1, 1]  # written behind one barrier, read behind the next


def test_sizes():
    for dim in range(8, sizes.MAX_DIM + 1, 8):
        lanes, threads = sizes.lanes_of(dim), sizes.threads_of(dim)
        assert dim // 8 <= lanes < 2 * (dim // 8) and (32 % lanes == 0 or lanes % 32 == 0)
        assert threads % lanes == threads % 32 == 0 and 128 <= threads <= 1024
        assert lanes // 32 <= 32  # numbers of a row in shared memory, one a lane


def test_grids():
    """As many blocks as run at once, fewer where rows are few."""
    assert operator.grid_of(8192, 2048) == 2 * 132 and operator.grid_of(8192, 5120) == 132
    assert operator.grid_of(1, 2048) == operator.grid_of(32, 64) == 1
    assert operator.grid_of(33, 64) == 2


# The operators, launches taken by PyTorch in float32.


@pytest.fixture
def launches(monkeypatch):
    """The kernels launched, in order, and whether with a delta or a gradient of the total."""
    names = []

    def launchers(dim, dtype, weight_dtype, residual, keep, with_normed=False):
        def forward(x, delta, weight, total, normed, rows, eps, offset, residual=residual):
            if not with_normed:
                names.append(("forward", residual))
            x, delta = x.view(rows, dim), delta.view(rows, dim)
            assert x.dtype == dtype and weight.dtype == weight_dtype
            result = add_rms_norm(x, delta if residual else None, weight, eps, offset, backend="torch")
            if residual:
                total.view(rows, dim).copy_(result[0])
            normed.view(rows, dim).copy_(result[1])

        def backward(d_normed, d_total, total, weight, d, normed, sums, rows, eps, offset):
            names.append(("backward", residual))
            if with_normed:
                forward(total, total, weight, total, normed, rows, eps, offset, False)
            assert keep and total.dtype == dtype and weight.dtype == weight_dtype
            assert sums.shape == (operator.grid_of(rows, dim), dim) and sums.dtype == torch.float32
            d_normed, d_total, total = (t.view(rows, dim).float() for t in (d_normed, d_total, total))
            results = plain_gradients(d_normed, d_total if residual else None, total, weight.float(), eps, offset)
            d.view(rows, dim).copy_(results[0])
            sums.copy_((results[1] / sums.shape[0]).expand_as(sums))

        return {"forward": forward, "backward": backward} if keep else {"forward": forward}

    monkeypatch.setattr(operator, "_launchers", launchers)
    return names


@pytest.mark.parametrize("with_delta", [True, False])
@pytest.mark.parametrize("shape", [(2, 7, 64), (5, 72), (64,), (1, 2, 3, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_operator(dtype, shape, with_delta, launches):
    x, delta, weight, cotangents = inputs(*shape, dtype=dtype, with_delta=with_delta)
    used = ("total", "normed") if with_delta else ("normed",)
    check(operator.run, x, delta, weight, cotangents, used=used)
    assert launches == [("forward", with_delta), ("backward", with_delta)]


def test_with_one_output_used(launches):
    x, delta, weight, cotangents = inputs(5, 64, dtype=torch.bfloat16)
    check(operator.run, x, delta, weight, cotangents, used=("normed",))
    assert launches == [("forward", True), ("backward", False)]
    launches.clear()
    check(operator.run, x, delta, weight, cotangents, used=("total",))
    assert launches == [("forward", True)]


def test_one_gradient_for_both(launches):
    """No copy of it."""
    x, delta, weight, cotangents = inputs(5, 64, dtype=torch.bfloat16)
    gradients = gradients_of(operator.run(x, delta, weight, EPS, 1.0), [x, delta, weight], cotangents)
    assert gradients[0].data_ptr() == gradients[1].data_ptr()


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_the_weight(weight_dtype, launches):
    x, delta, weight, cotangents = inputs(5, 64, dtype=torch.float16, weight_dtype=weight_dtype)
    check(operator.run, x, delta, weight, cotangents)


def test_layouts(launches):
    """What does not lie in one piece from a multiple of 16 bytes is copied."""
    _, _, weight, cotangents = inputs(5, 64, dtype=torch.bfloat16)
    whole = draw(5, 192, seed=5, dtype=torch.bfloat16)
    for x in (whole[:, 64:128], draw(64, 5, dtype=torch.bfloat16).t(), draw(324, dtype=torch.bfloat16)[4:].view(5, 64)):
        leaf = x.detach().requires_grad_()
        check(operator.run, leaf, draw(5, 64, seed=1, dtype=torch.bfloat16).requires_grad_(), weight, cotangents)
        check(operator.run, draw(5, 64, seed=1, dtype=torch.bfloat16).requires_grad_(), leaf, weight, cotangents)
        check(operator.run, leaf, None, weight, cotangents, used=("normed",))
    x, delta, weight, _ = inputs(5, 64, dtype=torch.bfloat16)
    one = torch.ones(1, dtype=torch.bfloat16).expand(5, 64)
    check(operator.run, x, delta, draw(65)[1:].requires_grad_(), [one, one])


def test_no_rows(launches):
    for with_delta in (True, False):
        x, delta, weight, _ = inputs(2, 0, 64, dtype=torch.bfloat16, with_delta=with_delta)
        total, normed = operator.run(x, delta, weight, EPS, 0.0)
        (total.sum() + normed.sum()).backward()
        assert total.shape == normed.shape == x.grad.shape == x.shape and weight.grad.abs().max() == 0
    assert launches == []


def test_what_is_kept(launches):
    for with_delta in (True, False):
        x, delta, weight, _ = inputs(5, 64, dtype=torch.bfloat16, with_delta=with_delta)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            total, _ = operator.run(x, delta, weight, EPS, 0.0)
        assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (total, weight)}


def test_opcheck(launches):
    *leaves, (d_total, d_normed) = inputs(3, 5, 64, dtype=torch.bfloat16)
    x, delta, weight = (t.detach() for t in leaves)
    opcheck(operator._add_op, (*leaves, EPS, 1.0))
    opcheck(operator._norm_op, (leaves[0], leaves[2], EPS, 1.0))
    opcheck(operator._add_op, (x, delta, weight, EPS, 1.0))
    opcheck(operator._norm_op, (x, weight, EPS, 1.0))
    for other in (d_total, None):
        opcheck(operator._backward_op, (d_normed, other, x, weight, EPS, 1.0))
        opcheck(operator.backward_and_normed, (d_normed, other, x, weight, EPS, 1.0))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, launches):
    *leaves, _ = inputs(5, 64, dtype=torch.bfloat16)

    def function(x, delta, weight):
        total, normed = operator.run(x, delta, weight, EPS, 1.0)
        return total.float() + normed.float()

    expected = torch.autograd.grad(function(*leaves).sum(), leaves)
    launches.clear()
    torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=use_reentrant).sum().backward()
    assert [name for name, _ in launches] == ["forward", "forward", "backward"]
    assert all(torch.equal(leaf.grad, wanted) for leaf, wanted in zip(leaves, expected, strict=True))


def test_no_second_gradients(launches):
    x, delta, weight, _ = inputs(5, 64, dtype=torch.bfloat16)
    for given in (delta, None):
        _, normed = operator.run(x, given, weight, EPS, 1.0)
        (dx,) = torch.autograd.grad(normed.float().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="no second gradients"):
            dx.float().sum().backward()


def test_through_the_public_function(launches, monkeypatch):
    """Compiled whole, a block as in a model, traced anew once for all lengths."""
    torch._dynamo.reset()
    ours = backends._registry[OPERATOR]["tilelang"]
    runs = dataclasses.replace(ours, refuses=lambda call: None)
    monkeypatch.setitem(backends._registry[OPERATOR], "tilelang", runs)
    monkeypatch.setattr(backends, "_decided", {})
    monkeypatch.setattr(backends, "_said", set())
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(x, delta, weight):
        total, normed = add_rms_norm(x, None, weight, EPS, 1.0)
        total, normed = add_rms_norm(total, normed * 2, weight, EPS, 1.0)
        return add_rms_norm(total, normed + delta, weight, EPS, 1.0)

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for size in (7, 30, 40, 50):
        *leaves, cotangents = inputs(2, size, 64, dtype=torch.bfloat16)
        results = []
        for variant in (function, compiled):
            outputs = variant(*leaves)
            results.append([*outputs, *gradients_of(outputs, leaves, cotangents)])
        assert all(torch.equal(eager, other) for eager, other in zip(*results, strict=True))
    assert "add_rms_norm: backend tilelang on cpu (first choice)" in backends.decisions()
    assert counter.frame_count == 2


# On a GPU.


CASES = [(dim, torch.bfloat16, torch.float32) for dim in (64, 256, 1024, 2048, 2560, 3840, 5120, 8192)]
CASES += [(dim, torch.float16, torch.float16) for dim in (72, 2048)]


@pytest.mark.gpu
@pytest.mark.parametrize(("dim", "dtype", "weight_dtype"), CASES)
def test_on_a_gpu(dim, dtype, weight_dtype):
    def run(*arguments):
        return add_rms_norm(*arguments, backend="tilelang")

    for shape in ((1, dim), (7, dim), (2, 1031, dim), (2**24 // dim, dim)):
        for with_delta, used, offset in ((True, USED[0], 1.0), (True, USED[2], 0.0), (False, USED[2], 1.0)):
            given = inputs(*shape, dtype=dtype, weight_dtype=weight_dtype, with_delta=with_delta, device="cuda")
            first, second = (check(run, *given, eps=1e-6, offset=offset, used=used) for _ in range(2))
            assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dim", [64, 1024, 2048])
def test_the_normed_rows_again(dim, residual):
    """Bit for bit those of the forward, beside the same gradients but for the last bit: another kernel, whose
    products and sums the compiler may fuse in another way."""
    x, delta, weight, (d_total, d_normed) = inputs(1031, dim, dtype=torch.bfloat16, device="cuda")
    total, normed = (t.detach() for t in add_rms_norm(x, delta, weight, 1e-6, 1.0, backend="tilelang"))
    given = d_normed, d_total if residual else None, total, weight.detach(), 1e-6, 1.0
    *gradients, again = operator.backward_and_normed(*given)
    assert torch.equal(again, normed)
    for one, other in zip(gradients, operator._backward_op(*given), strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7 if one.dtype == torch.bfloat16 else 1e-4, atol=1e-5)


@pytest.mark.gpu
def test_a_row_keeps_to_itself():
    """NaN in one row stays there."""
    x, delta, weight, (d_total, d_normed) = inputs(9, 2048, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        x[4, 2] = NAN
    outputs = add_rms_norm(x, delta, weight, 1e-6, backend="tilelang")
    dx, _, _ = gradients_of(outputs, [x, delta, weight], (d_total, d_normed))
    for got in (outputs[1], dx):
        bad = got.isnan().any(-1)
        assert bad[4] and bad.sum() == 1


@pytest.mark.gpu
def test_compiled_and_in_a_graph():
    *leaves, cotangents = inputs(2, 256, 2048, dtype=torch.bfloat16, device="cuda")

    def function(x, delta, weight):
        total, normed = add_rms_norm(x * 2, delta, weight, 1e-6, 1.0, backend="tilelang")
        return total, normed * 2

    eager = function(*leaves)
    compiled = torch.compile(function, fullgraph=True)(*leaves)
    for one, other in zip(*([*y, *gradients_of(y, leaves, cotangents)] for y in (eager, compiled)), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    x, delta, weight = (t.detach() for t in leaves)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, normed = add_rms_norm(x, delta, weight, 1e-6, backend="tilelang")
    graph.replay()
    assert torch.equal(normed, add_rms_norm(x, delta, weight, 1e-6, backend="tilelang")[1])
