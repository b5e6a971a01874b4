"""`A_log` and `dt_bias` stay float32 whatever happens to the model, and every parameter starts as documented."""

import copy
import math

import pytest
import torch
from model_helpers import OLMO, small_config, small_model, tokens

from qlatrain.models import HybridForCausalLM, layers
from qlatrain.models.initialization import initialize
from qlatrain.models.layers import GatedDeltaNet

CASTS = {
    "to bfloat16": lambda model: model.to(torch.bfloat16),
    "bfloat16()": lambda model: model.bfloat16(),
    "half()": lambda model: model.half(),
    "double()": lambda model: model.double(),
    "there and back": lambda model: model.bfloat16().float(),
    "to a device and a dtype": lambda model: model.to("cpu", torch.bfloat16),
    "as another tensor": lambda model: model.to(torch.zeros(1, dtype=torch.bfloat16)),
    "one layer by itself": lambda model: (model.model.layers[0].linear_attn.bfloat16(), model)[1],
    "a copy": lambda model: copy.deepcopy(model).bfloat16(),
}


def gates(model):
    return {name: x for name, x in model.named_parameters() if name.endswith(("A_log", "dt_bias"))}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_a_cast_does_not_touch_them(cast):
    model = small_model(num_hidden_layers=3)
    before = {name: x.detach().clone() for name, x in gates(model).items()}
    assert len(before) == 4
    model = cast(model)
    for name, x in gates(model).items():
        assert x.dtype == torch.float32 and torch.equal(x, before[name]), name
        assert isinstance(x, torch.nn.Parameter) and x.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_rest_is_cast_and_the_model_runs(dtype):
    model = small_model()
    expected = model(tokens(1, 70)).detach()
    model.to(dtype)
    kept = gates(model)
    assert {x.dtype for name, x in model.named_parameters() if name not in kept} == {dtype}
    logits = model(tokens(1, 70))
    logits.float().square().mean().backward()
    assert logits.dtype == dtype
    tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float64: 1e-4}[dtype]
    assert (logits - expected).norm() <= tolerance * expected.norm()
    assert all(x.grad.dtype == x.dtype and x.grad.isfinite().all() for x in model.parameters())


def test_gradients_are_cast_with_their_parameters():
    model = small_model()
    model(tokens(1, 70)).square().mean().backward()
    model.bfloat16()
    for name, x in model.named_parameters():
        assert x.grad.dtype == x.dtype, name


def test_autocast_hands_them_over_as_they_are(monkeypatch):
    model = small_model(layer_pattern=["gdn"])
    before = {name: x.detach().clone() for name, x in gates(model).items()}
    seen = []

    def spy(*args, **options):
        seen.append((options["A_log"], options["dt_bias"]))
        return chunk_gated_delta_rule(*args, **options)

    chunk_gated_delta_rule = layers.chunk_gated_delta_rule
    monkeypatch.setattr(layers, "chunk_gated_delta_rule", spy)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens(1, 70), labels=tokens(1, 70, seed=1))
    loss.backward()
    assert len(seen) == 2 and loss.dtype == torch.float32
    for (A_log, dt_bias), layer in zip(seen, model.model.layers, strict=True):
        assert A_log is layer.linear_attn.A_log and dt_bias is layer.linear_attn.dt_bias
    for name, x in gates(model).items():
        assert x.dtype == x.grad.dtype == torch.float32 and torch.equal(x, before[name])
        assert x.grad.isfinite().all() and x.grad.abs().max() > 0


def test_a_small_decay_rate_survives():
    """In bfloat16 the logarithm of the decay rate moves by up to one part in 256, and with it every long memory."""
    model = small_model()
    A_log = model.model.layers[0].linear_attn.A_log
    with torch.no_grad():
        A_log.copy_(torch.tensor([1e-8, 0.0101, 15.99, 16.0]).log())
    before = A_log.detach().clone()
    model.bfloat16()
    assert torch.equal(model.model.layers[0].linear_attn.A_log, before)


# ---------------------------------------------------------------- how parameters start


@pytest.fixture(scope="module")
def wide():
    """Enough heads and weights for statistics."""
    changes = {
        "hidden_size": 256,
        "vocab_size": 800,
        "intermediate_size": 300,
        "num_hidden_layers": 8,
        "linear_num_key_heads": 64,
        "linear_num_value_heads": 128,
        "linear_key_head_dim": 2,
        "linear_value_head_dim": 2,
        "initializer_range": 0.03,
        "attention_bias": True,
    }
    return HybridForCausalLM(small_config(**changes), seed=0)


def test_start_of_matrices(wide):
    residual = ("out_proj.weight", "o_proj.weight", "down_proj.weight")
    seen = 0
    for name, x in wide.named_parameters():
        if x.dim() != 2:
            continue
        std = 0.03 / math.sqrt(2 * 8) if name.endswith(residual) else 0.03
        error = 5 * std / math.sqrt(x.numel())  # five standard errors
        assert abs(x.std().item() - std) < error and abs(x.mean().item()) < error, name
        assert x.abs().max() < 6 * std  # normal tails
        assert x.abs().max() > 2.5 * std
        seen += name.endswith(residual)
    assert seen == 16


def test_start_of_norms_and_biases(wide):
    for name, x in wide.named_parameters():
        if name.endswith("linear_attn.norm.weight"):
            assert (x == 1).all(), name
        elif "norm" in name or name.endswith(".bias"):
            assert (x == 0).all(), name


@pytest.mark.parametrize("width", [2, 4])
def test_start_of_convolutions(width):
    model = HybridForCausalLM(small_config(linear_conv_kernel_dim=width, linear_value_head_dim=500), seed=0)
    x = model.model.layers[0].linear_attn.conv1d.weight
    bound = width**-0.5
    assert x.shape == (2 * 16 + 2000, 1, width)
    assert 0.99 * bound < x.abs().max() <= bound
    assert x.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)


def test_start_of_olmo_hybrid():
    """As OLMo-core starts it: every matrix and filter alike, whatever the depth."""
    changes = {"hidden_size": 256, "head_dim": 64, "num_hidden_layers": 4, "vocab_size": 800, "initializer_range": 0.03}
    model = HybridForCausalLM(small_config(**OLMO | changes, linear_value_head_dim=60), seed=0)
    for name, x in model.named_parameters():
        if x.dim() > 1:
            error = 5 * 0.03 / math.sqrt(x.numel())  # five standard errors
            assert abs(x.std().item() - 0.03) < error and abs(x.mean().item()) < error, name
        elif "norm" in name:
            assert (x == 1).all(), name
    dt = torch.cat([x.detach() for name, x in gates(model).items() if name.endswith("dt_bias")])
    A = torch.cat([x.detach() for name, x in gates(model).items() if name.endswith("A_log")]).exp()
    assert len(A) == len(dt) == 2 * 4 and A.min() >= 0.0099 and A.max() <= 16.001
    assert torch.nn.functional.softplus(dt).min() > 0.00099 and torch.nn.functional.softplus(dt).max() < 0.101


def test_start_of_gates(wide):
    mixers = [module for module in wide.modules() if isinstance(module, GatedDeltaNet)]
    A = torch.cat([mixer.A_log for mixer in mixers]).detach().exp()
    dt = torch.nn.functional.softplus(torch.cat([mixer.dt_bias for mixer in mixers]).detach().double())
    assert len(A) == len(dt) == 4 * 128
    assert A.isfinite().all() and A.min() >= 0.0099 and A.max() <= 16.001
    assert A.mean().item() == pytest.approx(8, abs=0.9) and A.std().item() == pytest.approx(16 / 12**0.5, rel=0.1)
    assert not torch.equal(A.bfloat16().float(), A) and len(A.unique()) > 500, "drawn in less than float32"
    assert dt.min() > 0.000999 and dt.max() < 0.1001
    logs = dt.log10()
    assert logs.mean().item() == pytest.approx(-2, abs=0.12)
    assert logs.std().item() == pytest.approx(2 / 12**0.5, rel=0.1)
    assert not torch.equal(mixers[0].A_log, mixers[1].A_log)


def test_the_seed_alone_decides():
    """Neither the state of the global generator nor what stood in the parameters before."""

    def state(seed):
        return HybridForCausalLM(small_config(), seed=seed).state_dict()

    torch.manual_seed(1)
    first = state(7)
    torch.manual_seed(2)
    second, other = state(7), state(8)
    for name, x in first.items():
        assert torch.equal(x, second[name]), name
        assert torch.equal(x, other[name]) == ("norm" in name), name


def test_initialisation_draws_nothing_from_the_global_generator():
    model = small_model()
    before = torch.get_rng_state()
    initialize(model, model.config, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tied_head_is_the_embedding():
    model = HybridForCausalLM(small_config(tie_word_embeddings=True, hidden_size=64, vocab_size=500), seed=0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)
