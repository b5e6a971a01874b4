import pytest
import torch
from training_helpers import assert_identical, fill_gradients, optimizers_of, snapshot, tiny_model

from qlatrain.config import OptimConfig, ParallelConfig
from qlatrain.parallel import Layout
from qlatrain.training import optimizer as optimizer_module
from qlatrain.training.optimizer import Optimizers

NO_SKIP, SKIP = torch.tensor(0.0), torch.tensor(1.0)
BIAS = ("q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias")


def groups(optimizers) -> dict[str, tuple[str, float]]:
    """Parameter → (optimizer, weight decay)."""
    return {
        optimizers.names[parameter]: (type(part).__name__, group["weight_decay"])
        for part in optimizers.parts
        for group in part.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("tied", [True, False])
def test_adamw_decays_matrices_only(tied):
    model = tiny_model(tie_word_embeddings=tied, attention_bias=True)
    found = groups(optimizers_of(model, "adamw", weight_decay=0.3))
    assert found.keys() == dict(model.named_parameters()).keys()
    assert {part for part, _ in found.values()} == {"AdamW"}
    undecayed = {name for name, (_, decay) in found.items() if decay == 0}
    assert {name for name, (_, decay) in found.items() if decay == 0.3} | undecayed == found.keys()
    for name, parameter in model.named_parameters():
        special = "norm" in name or "conv1d" in name or name.endswith(("A_log", "dt_bias", *BIAS))
        assert (name in undecayed) == special, name
        assert special or parameter.ndim == 2
    assert any("conv1d" in name for name in undecayed) and any(name.endswith("A_log") for name in undecayed)
    assert any(name.endswith(BIAS) for name in undecayed)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_rounded_gradients_need_our_own_kernel(name):
    model = tiny_model()
    joints = model.model.joints
    with pytest.raises(ValueError, match=r"train\.gradient_dtype=bfloat16 needs .* our own AdamW"):
        Optimizers(list(model.named_parameters()), OptimConfig(name=name), joints, joints)
    assert not any(joint.rounds_gradients for joint in joints)


def test_rounded_gradients_are_found(monkeypatch):
    """Those of a product's weights in their one tensor, all others where they were; and are dropped with them."""
    monkeypatch.setattr(optimizer_module, "_refuses_own_kernel", lambda matrices: None)
    model = tiny_model()
    joints = model.model.joints
    optimizers = Optimizers(list(model.named_parameters()), OptimConfig(name="adamw"), joints, joints)
    for joint in joints:
        joint.refresh(torch.bfloat16)
        (receiver,) = joint.receivers()
        receiver.grad = torch.randn_like(receiver)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    joint, ours = joints[0], optimizers.parts[0]
    for i, weight in enumerate(joint.weights()):
        assert torch.equal(ours.gradient_of(weight), joint.gradient_part(i)) and weight.grad is None
    assert ours.gradient_of(model.model.embed_tokens.weight) is None
    gradients = optimizers.gradients()
    assert len(gradients) == len(joints) + 1 and gradients[-1] is model.model.norm.weight.grad
    norm = Layout(ParallelConfig("single"), "no").gradient_norm(gradients)
    torch.testing.assert_close(norm, torch.cat([g.float().flatten() for g in gradients]).norm())
    optimizers.zero_grad()
    assert optimizers.gradients() == []


@pytest.mark.parametrize("tied", [True, False])
def test_muon_takes_the_matrices_inside_the_blocks(tied):
    model = tiny_model(tie_word_embeddings=tied)
    found = groups(optimizers_of(model, "muon", weight_decay=0.3, muon_weight_decay=0.2))
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        inside = ".layers." in name and parameter.ndim == 2
        outside = 0.3 if parameter.ndim == 2 else 0.0
        assert found[name] == (("Muon", 0.2) if inside else ("AdamW", outside)), name
    outside_blocks = {name for name, (part, decay) in found.items() if part == "AdamW" and decay}
    assert outside_blocks == ({"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"}))
    assert sum(part == "Muon" for part, _ in found.values()) > 10


def test_every_parameter_moves_at_its_own_rate():
    model = tiny_model()
    optimizers = optimizers_of(model, "muon", lr=0.1, muon_lr=0.5, weight_decay=0.0)
    before = snapshot(model, optimizers)
    fill_gradients(model)
    optimizers.step(0.5, NO_SKIP)
    assert optimizers.learning_rate == pytest.approx(0.05)
    assert [part.param_groups[0]["lr"] for part in optimizers.parts] == pytest.approx([0.05, 0.25])
    for name, parameter in model.named_parameters():
        moved = (parameter.detach() - before[name]).abs().max().item()
        if ".layers." in name and parameter.ndim == 2:
            assert 0.02 < moved < 0.5, name
        else:
            assert moved == pytest.approx(0.05, rel=1e-3), name  # the first step of Adam is lr · sign
    optimizers.step(1.0, NO_SKIP)
    assert optimizers.learning_rate == pytest.approx(0.1)  # of the peak, not of the step before


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_left_out_is_bit_identical(name, steps_before, bad):
    model = tiny_model()
    optimizers = optimizers_of(model, name)
    for step in range(steps_before):
        fill_gradients(model, seed=step)
        optimizers.step(1.0, NO_SKIP)
    before = snapshot(model, optimizers)
    fill_gradients(model, seed=9, value=bad)
    optimizers.step(0.7, SKIP)
    after = snapshot(model, optimizers)
    if not steps_before:  # the state came into being, and counts no step
        assert all(not value.any() for key, value in after.items() if key not in before)
        after = {key: value for key, value in after.items() if key in before}
    assert_identical(after, before)
    fill_gradients(model, seed=10)
    optimizers.step(0.7, NO_SKIP)
    assert not torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_round_trip(name):
    """What was loaded goes on bit for bit as what was saved, with and without a skipped step between."""
    model, other = tiny_model(), tiny_model(seed=5)
    optimizers, fresh = optimizers_of(model, name), optimizers_of(other, name)
    for step, skip in enumerate((NO_SKIP, SKIP, NO_SKIP)):
        fill_gradients(model, seed=step)
        optimizers.step(1.0, skip)
    with torch.no_grad():
        for own, parameter in zip(other.parameters(), model.parameters(), strict=True):
            own.copy_(parameter)
    saved = {key: value.clone() for key, value in optimizers.state().items()}
    fresh.load_state(saved)
    assert_identical(fresh.state(), saved)
    for both in ((model, optimizers), (other, fresh)):
        fill_gradients(both[0], seed=7)
        both[1].step(0.5, NO_SKIP)
    assert_identical(snapshot(other, fresh), snapshot(model, optimizers))
    assert saved["model.norm.weight/step"] == 2  # the loaded state is a copy, and the skipped step is not counted


def test_state_names():
    model = tiny_model()
    optimizers = optimizers_of(model)
    assert optimizers.state() == {}
    fill_gradients(model)
    optimizers.step(1.0, NO_SKIP)
    kinds: dict[str, set[str]] = {}
    for key in optimizers.state():
        name, kind = key.split("/")
        kinds.setdefault(name, set()).add(kind)
    assert kinds.keys() == dict(model.named_parameters()).keys()
    assert kinds["model.layers.0.mlp.up_proj.weight"] == {"momentum_buffer"}
    assert kinds["model.embed_tokens.weight"] == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(("saved", "current"), [("muon", "adamw"), ("adamw", "muon")])
def test_state_of_another_optimizer(saved, current):
    model = tiny_model()
    first, second = optimizers_of(model, saved), optimizers_of(model, current)
    fill_gradients(model)
    first.step(1.0, NO_SKIP)
    with pytest.raises(ValueError, match="resume with the optimizer it was saved with") as caught:
        second.load_state(first.state())
    assert "momentum_buffer" in str(caught.value) and "exp_avg" in str(caught.value)
    assert second.state() == {}


def test_state_of_other_parameters():
    model = tiny_model()
    optimizers = optimizers_of(model)
    fill_gradients(model)
    optimizers.step(1.0, NO_SKIP)
    state = optimizers.state() | {"nothing.of.ours/exp_avg": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"'nothing\.of\.ours'"):
        optimizers.load_state(state)


def test_zero_grad():
    model = tiny_model()
    fill_gradients(model)
    optimizers_of(model).zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
