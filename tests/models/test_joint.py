"""Projections in half precision over float32 weights. On a CPU: `cast_dtype` is told that there is a GPU."""

import pytest
import torch
import torch.nn.functional as F
from model_helpers import small_config
from torch import nn

from qlakernels.gated_delta_net.api import Heads, gated_delta_net
from qlakernels.products import product_with, weight_gradient
from qlatrain.models import HybridForCausalLM, hybrid
from qlatrain.models.head import linear_cross_entropy
from qlatrain.models.joint import Joint, cast_dtype


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 12, bias=False), nn.Linear(16, 9, bias=False)
        self.joint = Joint(self, "a", "b")


def test_outputs_and_gradients_are_those_of_each():
    two = Two()
    two.joint.refresh(torch.bfloat16)
    assert two.joint.cast.shape == (24, 16) and two.joint.cast[21:].abs().sum() == 0
    x = draw(2, 5, 16, dtype=torch.bfloat16).requires_grad_()
    outputs = two.joint.apart(x)
    assert [tuple(o.shape) for o in outputs] == [(2, 5, 12), (2, 5, 9)]
    dys = [draw(*o.shape, seed=i, dtype=torch.bfloat16) for i, o in enumerate(outputs)]
    got = torch.autograd.grad(outputs, [x, two.a.weight, two.b.weight], dys)
    x64 = x.detach().double()
    weights = [layer.weight.detach().bfloat16().double() for layer in (two.a, two.b)]
    for output, weight in zip(outputs, weights, strict=True):
        torch.testing.assert_close(output.double(), x64 @ weight.T, rtol=2**-8, atol=1e-2)
    for gradient, dy in zip(got[1:], dys, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(
            gradient.double(), dy.double().flatten(0, 1).T @ x64.flatten(0, 1), rtol=0.01, atol=0.05
        )
    dx = sum(dy.double() @ weight for dy, weight in zip(dys, weights, strict=True))
    torch.testing.assert_close(got[0].double(), dx, rtol=0.01, atol=0.05)


def test_rounded_gradients():
    """All in one tensor, of the cast's dtype: those of the weights, rounded; nothing arrives at the weights."""
    two, x = Two(), draw(2, 5, 16, dtype=torch.bfloat16)
    two.joint.refresh(torch.bfloat16)
    dy = draw(2, 5, 24, seed=1, dtype=torch.bfloat16)
    two.joint(x).backward(dy)
    expected = [layer.weight.grad for layer in (two.a, two.b)]
    two.zero_grad()
    two.joint.rounds_gradients = True
    assert two.joint.gradient is None and two.joint.gradient_part(1) is None
    two.joint(x).backward(dy)
    assert two.a.weight.grad is None and two.joint.gradient.shape == (21, 16)
    for i, gradient in enumerate(expected):
        assert torch.equal(two.joint.gradient_part(i), gradient.bfloat16())
    with torch.no_grad():
        two.a.weight.mul_(2)
    two.joint.refresh(torch.bfloat16)
    assert two.joint.receivers()[0].data_ptr() == two.joint.cast.data_ptr()
    two.joint.drop_gradient()
    assert two.joint.gradient is None


def test_casts_follow_the_weights():
    """An update, new data and another dtype are seen; without any of them nothing is cast anew."""
    two = Two()
    two.joint.refresh(torch.bfloat16)
    first = two.joint.cast
    assert torch.equal(first[:12], two.a.weight.bfloat16())
    version = first._version
    two.joint.refresh(torch.bfloat16)
    assert two.joint.cast is first and first._version == version
    optimizer = torch.optim.AdamW(two.parameters(), lr=0.1, fused=True)
    two.joint(draw(1, 3, 16)).float().sum().backward()
    optimizer.step()
    two.joint.refresh(torch.bfloat16)
    assert torch.equal(first[12:21], two.b.weight.bfloat16()) and first._version > version
    two.a.weight.data = draw(12, 16, seed=3)
    two.joint.refresh(torch.bfloat16)
    assert torch.equal(first[:12], draw(12, 16, seed=3).bfloat16())
    two.joint.refresh(torch.float16)
    assert torch.equal(two.joint.cast[:12], two.a.weight.half())


def test_own_ways():
    """Layers are called as they are without a cast, and with a bias or an adapter around one of them."""
    two = Two()
    x = draw(1, 3, 16)
    assert all(torch.equal(o, layer(x)) for o, layer in zip(two.joint.apart(x), (two.a, two.b), strict=True))
    two.joint.refresh(torch.bfloat16)
    two.a = nn.Sequential(two.a)
    two.joint.refresh(torch.bfloat16)
    assert two.joint.cast is None
    two.a = nn.Linear(16, 12)
    two.joint.refresh(torch.bfloat16)
    assert two.joint.cast is None and cast_dtype("cpu") is None


def test_frozen_weights_cost_nothing():
    weight = draw(8, 16).requires_grad_(False)
    x = draw(2, 16).requires_grad_()
    product_with(x, (weight,), weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(2, -1))


def test_operators_are_sound():
    x, dy = draw(6, 16, dtype=torch.bfloat16), draw(6, 8, seed=1, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.qlakernels.weight_gradient.default, (dy, x, torch.float32))
    assert weight_gradient(dy, x, torch.float32).dtype == torch.float32


@pytest.mark.parametrize("slices", [1, 3])
def test_cross_entropy(slices, monkeypatch):
    monkeypatch.setattr("qlatrain.models.head.TOKENS_AT_ONCE", -(-11 // slices))
    x, weight = draw(11, 16).requires_grad_(), draw(40, 16, seed=1).requires_grad_()
    labels = torch.tensor([1, 2, -100, 39, 0, 5, 6, -100, 8, 9, 10])
    nll = linear_cross_entropy(x, labels, weight, weight.detach())
    expected = F.cross_entropy(x @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(nll, expected)
    for got, right in zip(
        torch.autograd.grad(0.3 * nll, [x, weight]), torch.autograd.grad(0.3 * expected, [x, weight]), strict=True
    ):
        torch.testing.assert_close(got, right)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, labels, weight, weight.detach()), expected.detach())


def test_a_mixer_is_its_operators():
    """The plain form of the whole mixer, in float64, its output weight cast or not."""
    heads = Heads(2, 16, 4, 8)
    joint = draw(1, 21, heads.joint[-1] + 3, dtype=torch.float64).requires_grad_()
    shapes = [(heads.convolved, 4), (4,), (4,), (8,), (24, heads.values)]
    weights = [draw(*shape, seed=i, dtype=torch.float64).requires_grad_() for i, shape in enumerate(shapes)]
    ways = [gated_delta_net(joint, *weights, heads, out_cast=cast) for cast in (None, weights[-1].detach())]
    assert ways[0].shape == (1, 21, 24) and torch.equal(*ways)
    gradients = [torch.autograd.grad(way.sum(), [joint, *weights], allow_unused=True) for way in ways]
    for got, right in zip(*gradients, strict=True):
        torch.testing.assert_close(got, right)
    assert gradients[0][0][..., heads.joint[-1] :].abs().sum() == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"joint": draw(1, 4, 10)}, "joint has shape"),
        ({"norm_weight": draw(9)}, "norm_weight has shape"),
        ({"cu_seqlens": torch.tensor([0, 21])}, "without position_ids"),
        ({"position_ids": torch.zeros(1, 3)}, "position_ids has shape"),
    ],
)
def test_bad_arguments_of_a_mixer(changed, message):
    heads = Heads(2, 16, 4, 8)
    arguments = {
        "joint": draw(1, 21, heads.joint[-1]),
        "conv_weight": draw(heads.convolved, 4),
        "A_log": draw(4),
        "dt_bias": draw(4),
        "norm_weight": draw(8),
        "out_weight": draw(24, heads.values),
    }
    with pytest.raises(ValueError, match=message):
        gated_delta_net(**arguments | changed, heads=heads)


@pytest.mark.parametrize("architecture", ["qwen3_5", "olmo_hybrid"])
def test_a_model_with_casts(architecture, monkeypatch):
    """With casts to float32 it is the model without them; state dict and checkpoints know nothing of them."""
    config = small_config(architecture=architecture)
    model = HybridForCausalLM(config, seed=0)
    names = set(model.state_dict())
    ids = torch.randint(config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, 1)
    expected = model(ids, labels=labels)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    logits = model(ids)
    monkeypatch.setattr(hybrid, "cast_dtype", lambda device_type: torch.float32)
    got = model(ids, labels=labels)
    assert all(joint.cast is not None for joint in model.model.joints)
    torch.testing.assert_close(got, expected)
    for mine, right in zip(torch.autograd.grad(got, list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(ids), logits, rtol=1e-4, atol=1e-5)
    assert set(model.state_dict()) == names
    monkeypatch.setattr(hybrid, "cast_dtype", lambda device_type: torch.bfloat16)
    assert model(ids, labels=labels).item() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize("keep_products", [True, False])
@pytest.mark.parametrize("architecture", ["qwen3_5", "olmo_hybrid"])
def test_a_model_with_gradients_in_one_tensor(architecture, keep_products, monkeypatch):
    """They are those of the weights, which get none; what is no product keeps its own."""
    monkeypatch.setattr(hybrid, "cast_dtype", lambda device_type: torch.float32)
    config = small_config(architecture=architecture)
    model = HybridForCausalLM(config, seed=0)
    ids = torch.randint(config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
    for mlp in model.model.mlps:
        mlp.keep_products = keep_products
    model(ids, labels=ids).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    for joint in model.model.joints:
        joint.rounds_gradients = True
    model(ids, labels=ids).backward()
    found = {weight: joint.gradient_part(i) for joint in model.model.joints for i, weight in enumerate(joint.weights())}
    assert len(found) >= 15
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (parameter in found), name
        torch.testing.assert_close(found.get(parameter, parameter.grad), expected[name], rtol=1e-4, atol=1e-6)


def test_who_updates_the_casts_as_well():
    """A cast is taken as it is after an update that wrote it; a weight that somebody else changes is cast anew."""
    two = Two()
    two.joint.refresh(torch.bfloat16)
    assert two.joint.is_fresh() and two.joint.part(1).data_ptr() == two.joint.cast[12:].data_ptr()
    with torch.no_grad():
        two.a.weight.add_(1)
        two.joint.part(0).copy_(two.a.weight)
    assert not two.joint.is_fresh()
    two.joint.accept()
    version = two.joint.cast._version
    two.joint.refresh(torch.bfloat16)
    assert two.joint.cast._version == version and torch.equal(two.joint.cast[:12], two.a.weight.bfloat16())
    with torch.no_grad():
        two.b.weight.zero_()
    two.joint.refresh(torch.bfloat16)
    assert two.joint.cast[12:].abs().sum() == 0
