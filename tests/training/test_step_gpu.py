"""Steps in half precision on a Hopper GPU: whole blocks traced, weights cast with their update."""

import pytest
import torch

from qlatrain.config import KernelConfig, ModelConfig, OptimConfig, ParallelConfig, StepConfig
from qlatrain.data.packing import IGNORE_INDEX, PackedBatch, Row, StreamPosition
from qlatrain.metrics.flops import FlopCounter
from qlatrain.models import HybridForCausalLM
from qlatrain.parallel import Layout
from qlatrain.training.matrix_adamw import MatrixAdamW
from qlatrain.training.step import TrainStep

pytestmark = pytest.mark.gpu
TOKENS = 512


def config() -> ModelConfig:
    return ModelConfig(
        name="small",
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        tie_word_embeddings=True,
    )


def step_of(backend: str = "auto", compiled: bool = False, gradient_dtype: str = "float32") -> TrainStep:
    layout = Layout(ParallelConfig("single"), "bf16")
    model = HybridForCausalLM(config(), KernelConfig(gated_delta_rule=backend), seed=0)
    train = StepConfig(mixed_precision="bf16", compile=compiled, gradient_dtype=gradient_dtype)
    return TrainStep.of(model, layout, train, OptimConfig(name="adamw", lr=1e-3), FlopCounter(config()).step_flops)


def batch(seed: int, lengths: list[int]) -> PackedBatch:
    """Two rows of documents of these lengths, which repeat a few tokens: something to learn."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(2):
        tokens = torch.randint(0, 1000, (8,), generator=random).repeat(TOKENS // 8).numpy().astype("int32")
        labels = torch.from_numpy(tokens).roll(-1).numpy().copy()
        labels[torch.tensor(lengths).cumsum(0).numpy() - 1] = IGNORE_INDEX
        rows.append(Row(tokens, labels, lengths, StreamPosition.beginning(0)))
    return PackedBatch.from_rows(rows)


LAYOUTS = [[TOKENS], [100, 412], [1, 63, 448], [200, 200, 112], [TOKENS], [7] * 64 + [64]]


@pytest.mark.parametrize("gradient_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_losses_are_those_of_plain_operators(compiled, gradient_dtype):
    torch._dynamo.reset()
    ours, plain = step_of(compiled=compiled, gradient_dtype=gradient_dtype), step_of(backend="torch")
    for seed in range(12):
        data = batch(seed, LAYOUTS[seed % len(LAYOUTS)])
        got, expected = ours([data], 1.0, False).read(), plain([data], 1.0, False).read()
        assert got.loss == pytest.approx(expected.loss, rel=0.02)
        assert got.grad_norm == pytest.approx(expected.grad_norm, rel=0.1)


def test_casts_follow_the_update():
    step = step_of()
    assert type(step.optimizers.parts[0]) is MatrixAdamW
    model = step.model
    joints = [*model.model.joints, model.joint_head]
    for seed in range(3):
        step([batch(seed, [TOKENS])], 1.0, False)
        assert all(joint.is_fresh() for joint in joints)  # nothing will be cast in the next step
        for joint in joints:
            for i, weight in enumerate(joint.weights()):
                assert torch.equal(joint.part(i), weight.bfloat16())


def test_a_step_waits_for_nothing():
    step = step_of()
    data = batch(0, [100, 412])
    for _ in range(2):
        step([data], 1.0, False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = step([data], 1.0, False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert pending.read().loss > 0


def test_blocks_are_not_traced_for_each_layout():
    torch._dynamo.reset()
    step = step_of(compiled=True)
    for seed, lengths in enumerate(LAYOUTS):
        step([batch(seed, lengths)], 1.0, False)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seed in range(6):
        cut = 50 + 61 * seed
        step([batch(seed, [cut, TOKENS - cut])], 1.0, False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    assert not torch._dynamo.utils.counters["graph_break"]
