"""MatrixAdamW on the CPU, its launches taken by PyTorch."""

import copy

import pytest
import torch
from torch import nn
from training_helpers import assert_identical

from qlatrain.training import matrix_adamw
from qlatrain.training.matrix_adamw import MatrixAdamW

SHAPES = [(8, 6), (3, 5), (7,), (1,), ()]
SETTINGS = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def by_torch(p, m, v, g, cast, step, factor, skip, lr, betas, eps, weight_decay):
    """What the kernel does, and asks of its arguments."""
    assert all(x.dtype == torch.float32 and x.shape == p.shape and x.is_contiguous() for x in (p, m, v, g))
    assert all(x.dtype == torch.float32 and x.numel() == 1 for x in (step, factor, skip))
    assert g.data_ptr() % 16 == 0
    if skip.item():
        return
    g, t = g * factor, step.item()
    m.copy_(betas[0] * m + (1 - betas[0]) * g)
    v.copy_(betas[1] * v + (1 - betas[1]) * g * g)
    p.mul_(1 - lr * weight_decay)
    p.sub_(lr / (1 - betas[0] ** t) * m / (v.sqrt() / (1 - betas[1] ** t) ** 0.5 + eps))
    if cast is not None:
        cast.copy_(p)


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    monkeypatch.setattr(matrix_adamw, "update", by_torch)


def draw(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(draw(shape, i)) for i, shape in enumerate(SHAPES)]


def groups_of(parameters) -> list[dict]:
    return [{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.0, "lr": 0.05}]


def fill(parameters, seed):
    for i, parameter in enumerate(parameters):
        parameter.grad = draw(parameter.shape, 100 * seed + i)


def values_of(optimizer) -> dict[str, torch.Tensor]:
    values = {}
    for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        values[f"{i}/parameter"] = parameter.detach().clone()
        values |= {f"{i}/{kind}": value.clone() for kind, value in optimizer.state[parameter].items()}
    return values


def assert_close(one, other):
    found, expected = values_of(one), values_of(other)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype and value.shape == expected[name].shape, name
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def pair():
    return (
        MatrixAdamW(groups_of(parameters()), **SETTINGS),
        torch.optim.AdamW(groups_of(parameters()), **SETTINGS, fused=True),
    )


def take(optimizer, seed, found_inf=None, grad_scale=None):
    fill([p for group in optimizer.param_groups for p in group["params"]], seed)
    if isinstance(optimizer, MatrixAdamW):
        optimizer.found_inf, optimizer.grad_scale = found_inf, grad_scale
    elif found_inf is not None and found_inf.item():
        return
    elif grad_scale is not None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad /= grad_scale.view(())
    optimizer.step()


def test_as_torch_with_steps_left_out_and_scales():
    ours, theirs = pair()
    for seed in range(6):
        found_inf = torch.tensor(float(seed in (2, 3))) if seed > 1 else None
        grad_scale = torch.tensor([0.5 + seed]) if seed != 1 else None
        for optimizer in (ours, theirs):
            take(optimizer, seed, found_inf, grad_scale)
    assert_close(ours, theirs)
    assert all(kept["step"] == 4 for kept in ours.state.values())


def test_a_step_left_out_is_bit_identical():
    ours, _ = pair()
    take(ours, 0)
    before = values_of(ours)
    take(ours, 1, torch.tensor(1.0), torch.tensor(2.0))
    assert_identical(values_of(ours), before)


def test_gradients_stay_as_they_are():
    ours, _ = pair()
    take(ours, 1, grad_scale=torch.tensor(3.0))
    for i, parameter in enumerate(ours.state):
        assert torch.equal(parameter.grad, draw(parameter.shape, 100 + i))


@pytest.mark.parametrize("fused", [True, False])
def test_states_there_and_back(fused):
    """Steps by one, then the other, and again the one are those of either alone."""
    (ours, theirs), (through, _) = pair(), pair()
    between = torch.optim.AdamW(groups_of(parameters()), **SETTINGS, fused=fused)

    def hand_over(giver, taker):
        taker.load_state_dict(copy.deepcopy(giver.state_dict()))
        for group, other in zip(giver.param_groups, taker.param_groups, strict=True):
            for p, q in zip(group["params"], other["params"], strict=True):
                q.data.copy_(p)

    for seed in range(6):
        take(ours, seed)
        take(theirs, seed)
    for seed in range(2):
        take(through, seed)
    hand_over(through, between)
    for seed in range(2, 4):
        take(between, seed)
    hand_over(between, through)
    for seed in range(4, 6):
        take(through, seed)
    assert_close(through, ours)
    assert_close(ours, theirs)
    first, second = ours.state_dict()["param_groups"][0], theirs.state_dict()["param_groups"][0]
    assert first == second


def test_states_that_do_not_fit():
    for option in ("amsgrad", "maximize"):
        theirs = torch.optim.AdamW(parameters(), **{option: True})
        with pytest.raises(ValueError, match=f"{option}=True"):
            MatrixAdamW(parameters()).load_state_dict(theirs.state_dict())


def test_casts_and_versions():
    given = parameters()
    casts = {given[0]: torch.zeros(8, 6).bfloat16(), given[2]: torch.zeros(7).half()}
    ours = MatrixAdamW(given, **SETTINGS, cast_of=casts.get)
    fill(given, 0)
    given[1].grad = None
    versions = [p._version for p in given]
    ours.step()
    assert all(torch.equal(cast, p.to(cast.dtype)) for p, cast in casts.items())
    assert given[1] not in ours.state and given[1]._version == versions[1]
    assert all(p._version > version for i, (p, version) in enumerate(zip(given, versions, strict=True)) if i != 1)
    assert MatrixAdamW.counts_updates


def test_versions_where_the_kernel_counts_none(monkeypatch):
    monkeypatch.setattr(matrix_adamw, "update", lambda *_: None)
    given = parameters()
    fill(given, 0)
    MatrixAdamW(given).step()
    assert all(p._version > 0 for p in given)


def test_gradients_that_lie_elsewhere():
    """Transposed, or at an odd place of a larger tensor."""
    whole = draw((49,), 3)
    for gradient in (draw((6, 8), 4).T, whole[1:].view(8, 6)):
        ours, theirs = pair()
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["params"][0].grad = gradient.contiguous() if optimizer is theirs else gradient
            optimizer.step()
        assert_close(ours, theirs)


def test_no_gradients():
    ours, _ = pair()
    ours.step()
    assert not ours.state
