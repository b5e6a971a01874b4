"""The AdamW kernel and the optimizer of its launches on a Hopper GPU, against torch's fused AdamW."""

import copy

import pytest
import torch
from torch import nn

from qlakernels.adamw import update
from qlatrain.training.matrix_adamw import MatrixAdamW

pytestmark = pytest.mark.gpu
SHAPES = [(1,), (3,), (5, 7), (127, 129), (1024,), (1025,), (2048, 1024), (1000, 999), ()]
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
BETAS = [(0.9, 0.95), (0.9, 0.999)]


def draw(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cuda()


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(draw(shape, i)) for i, shape in enumerate(SHAPES)]


def of_all(optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def take(optimizer, seed, found_inf, grad_scale):
    for i, p in enumerate(of_all(optimizer)):
        p.grad = draw(p.shape, 100 * seed + i) * grad_scale
        if found_inf:
            p.grad.fill_(torch.inf)
    optimizer.found_inf = torch.tensor(float(found_inf), device="cuda")
    optimizer.grad_scale = torch.tensor(grad_scale, device="cuda")
    optimizer.step()


def assert_close(ours, theirs):
    """m is a sum of what may cancel: to a millionth of its terms. Where β₂ is 0.999, the last bit of β₂^t is 1e-5 of
    an update, and two compilers may differ in it."""
    for p, q in zip(of_all(ours), of_all(theirs), strict=True):
        found, expected = ours.state[p], theirs.state[q]
        assert found.keys() == expected.keys()
        torch.testing.assert_close(p, q, rtol=1e-6, atol=3e-5 * SETTINGS["lr"])
        torch.testing.assert_close(found["exp_avg"], expected["exp_avg"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found["exp_avg_sq"], expected["exp_avg_sq"], rtol=2e-6, atol=0)
        assert found["step"].dtype == expected["step"].dtype and found["step"].shape == expected["step"].shape
        assert torch.equal(found["step"], expected["step"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None], ids=["bf16", "fp16", "no cast"])
@pytest.mark.parametrize("betas", BETAS, ids=str)
def test_as_torch(betas, dtype):
    given, settings = parameters(), SETTINGS | {"betas": betas}
    casts = {} if dtype is None else {p: torch.zeros(p.shape, dtype=dtype, device="cuda") for p in given}
    ours = MatrixAdamW(given, **settings, cast_of=casts.get)
    theirs = torch.optim.AdamW(parameters(), **settings, fused=True)
    for seed, (found_inf, grad_scale) in enumerate([(0, 1.0), (0, 3.0), (1, 0.1), (0, 1024.0), (0, 0.3)]):
        for optimizer in (ours, theirs):
            take(optimizer, seed, found_inf, grad_scale)
        assert all(torch.equal(cast, p.to(dtype)) for p, cast in casts.items())
    assert_close(ours, theirs)
    assert all(kept["step"] == 4 for kept in ours.state.values())


def test_gradients_in_half_precision():
    """As with the same values in float32, but for a last bit: another kernel, whose products may be fused otherwise."""
    runs = []
    for dtype in (torch.bfloat16, torch.float32):
        given = parameters()
        gradients = {}
        optimizer = MatrixAdamW(given, **SETTINGS, gradient_of=gradients.get)
        for seed in range(3):
            for i, p in enumerate(given):
                torch.manual_seed(10 * seed + i)
                gradients[p] = torch.randn_like(p).bfloat16().to(dtype)
            optimizer.step()
        runs.append(given)
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=3e-5 * SETTINGS["lr"])


@pytest.mark.parametrize("first", [True, False])
def test_a_step_left_out_changes_nothing(first):
    given = parameters()
    casts = {p: torch.full(p.shape, 7.0, dtype=torch.bfloat16, device="cuda") for p in given}
    ours = MatrixAdamW(given, **SETTINGS, cast_of=casts.get)
    if not first:
        take(ours, 0, 0, 1.0)

    def everything():
        values = [x.detach().clone() for pair in casts.items() for x in pair]
        return values + [x.clone() for p in given for x in ours.state[p].values()]

    before = everything()
    take(ours, 1, 1, 1.0)
    after = everything()
    if first:
        assert not any(x.any() for x in after[len(before) :])
    assert all(torch.equal(x, y) for x, y in zip(before, after[: len(before)], strict=True))


def test_states_there_and_back():
    ours, theirs, alone = (
        MatrixAdamW(parameters(), **SETTINGS),
        torch.optim.AdamW(parameters(), **SETTINGS, fused=True),
        torch.optim.AdamW(parameters(), **SETTINGS, fused=True),
    )

    def hand_over(giver, taker):
        taker.load_state_dict(copy.deepcopy(giver.state_dict()))
        with torch.no_grad():
            torch._foreach_copy_(of_all(taker), of_all(giver))

    for seed in range(6):
        take(alone, seed, 0, 1.0)
    for seed, (one, other) in enumerate([(ours, theirs), (theirs, ours), (ours, ours)]):
        take(one, 2 * seed, 0, 1.0)
        take(one, 2 * seed + 1, 0, 1.0)
        if one is not other:
            hand_over(one, other)
    assert_close(ours, alone)


def test_casts_in_a_larger_tensor():
    p = nn.Parameter(draw((6, 64), 0))
    p.grad = draw((6, 64), 1)
    together = torch.zeros(10, 64, dtype=torch.bfloat16, device="cuda")
    MatrixAdamW([p], **SETTINGS, cast_of=lambda _: together[2:8]).step()
    assert torch.equal(together[2:8], p.bfloat16()) and not together[:2].any() and not together[8:].any()


def test_nothing_waits_and_in_a_graph():
    ours, theirs = MatrixAdamW(parameters(), **SETTINGS), torch.optim.AdamW(parameters(), **SETTINGS, fused=True)
    for seed in range(2):
        take(ours, seed, 0, 1.0)
        take(theirs, seed, 0, 1.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    graph.replay()
    theirs.step()
    theirs.step()
    assert_close(ours, theirs)


@pytest.mark.parametrize("size", [2**29 + 2**20 + 3, 2**31 + 5], ids=["bytes", "elements"])
def test_more_than_32_bits_count(size):
    """Beyond 2³¹ bytes, and beyond as many elements: periods of a long tensor become those of a short one."""
    if torch.cuda.get_device_properties(0).total_memory < 20 * size:
        pytest.skip("needs more memory")
    period = draw(2**16, 0)
    tensors = [(period.abs() * (k + 1)).repeat(size // 2**16 + 1)[:size] for k in range(4)]
    cast = torch.empty(size, dtype=torch.bfloat16, device="cuda")
    small = [x[: 2**16].clone() for x in tensors]
    small_cast = torch.empty(2**16, dtype=torch.bfloat16, device="cuda")
    one, none = torch.ones(1, device="cuda"), torch.zeros(1, device="cuda")
    for arguments in ((*tensors, cast), (*small, small_cast)):
        update(*arguments, one, one, none, *SETTINGS.values())
    for x, expected in zip((*tensors, cast), (*small, small_cast), strict=True):
        whole = size // 2**16 * 2**16
        assert (x[:whole].view(-1, 2**16) == expected).all(1).all()
        assert torch.equal(x[whole:], expected[: size - whole])
