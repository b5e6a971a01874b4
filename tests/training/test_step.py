import io
import math

import pytest
import torch
from rich.console import Console
from training_helpers import (
    VOCABULARY,
    assert_identical,
    batch,
    one_process,
    optimizers_of,
    row,
    snapshot,
    tiny_model,
)

from qlatrain.config import TrackConfig
from qlatrain.metrics.console import RunConsole
from qlatrain.metrics.recorder import read_metrics
from qlatrain.metrics.throughput import Throughput
from qlatrain.metrics.trackers import Tracker
from qlatrain.training.checkpoints import TrainState
from qlatrain.training.report import Report, TrainingStopped
from qlatrain.training.step import TrainStep, validation_nll

ROWS = [row(24, seed=0), row(*[1] * 20, 4, seed=1), row(1, 2, 21, seed=2), row(7, 9, 8, seed=3)]  # targets: 23 3 21 21


class Run:
    def __init__(self, seed: int = 0, max_grad_norm: float = math.inf, **optimizer):
        self.model = tiny_model(seed)
        self.optimizers = optimizers_of(self.model, **({"name": "adamw", "lr": 1e-2} | optimizer))
        layout = one_process()
        count = lambda lengths: float((lengths**2).sum())  # noqa: E731
        self.step = TrainStep(layout.prepare(self.model), self.optimizers, layout, max_grad_norm, count)

    def take(self, *batches, factor: float = 1.0, stop: bool = False):
        return self.step(batches, factor, stop).read()

    def gradients(self, *batches) -> dict[str, torch.Tensor]:
        """Of a step that is then not taken."""
        taken = {}

        def look(factor, skip, gradient_factor):
            taken.update({name: p.grad * gradient_factor for name, p in self.model.named_parameters()})

        self.optimizers.step = look
        self.take(*batches)
        return taken


@pytest.mark.parametrize("split", [[1, 3], [2, 2], [3, 1], [1, 1, 1, 1]])
def test_ragged_micro_batches_are_one_big_batch(split):
    """The loss is a mean over all target tokens; a mean of means would weigh the row of 3 targets like one of 23."""
    rows, whole, parts = list(ROWS), Run(), Run()
    batches = [batch(*[rows.pop(0) for _ in range(count)]) for count in split]
    expected, got = whole.take(batch(*ROWS)), parts.take(*batches)
    assert got.targets == expected.targets == 23 + 3 + 21 + 21
    assert got.loss == pytest.approx(expected.loss, abs=1e-6)
    assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    assert got.flops == expected.flops
    gradients = Run().gradients(batch(*ROWS))
    for name, gradient in Run().gradients(*batches).items():
        torch.testing.assert_close(gradient, gradients[name], atol=1e-6, rtol=1e-4)


def test_loss_is_the_mean_over_targets():
    run, data = Run(), batch(*ROWS)
    with torch.no_grad():
        logits = run.model(data.input_ids, data)[0]
        expected = torch.nn.functional.cross_entropy(logits, data.labels[0], ignore_index=-100).item()
    result = run.take(data)
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert result.nll == pytest.approx(expected * data.num_targets, rel=1e-6)
    assert expected == pytest.approx(math.log(VOCABULARY), rel=0.5)


def test_training_lowers_the_loss():
    run, data = Run(), batch(*ROWS)
    losses = [run.take(data).loss for _ in range(15)]
    assert losses[-1] < 0.7 * losses[0]


def test_the_norm_is_told_before_clipping_and_clipped_after():
    free, clipped = Run(name="adamw"), Run(max_grad_norm=0.01)
    assert clipped.take(batch(*ROWS)).grad_norm == pytest.approx(free.take(batch(*ROWS)).grad_norm, rel=1e-6)
    gradients = Run(max_grad_norm=0.01).gradients(batch(*ROWS))
    assert math.sqrt(sum(float((g**2).sum()) for g in gradients.values())) == pytest.approx(0.01, rel=1e-3)


def test_gradients_do_not_add_up_over_steps():
    run = Run(lr=0.0)
    first, second = run.take(batch(*ROWS)), run.take(batch(*ROWS))
    assert first.grad_norm == second.grad_norm > 0
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_stop_and_rate_pass_through():
    run = Run(lr=0.2)
    assert run.take(batch(ROWS[0]), factor=0.25).stop == 0
    assert run.optimizers.learning_rate == pytest.approx(0.05)
    assert run.take(batch(ROWS[0]), stop=True).stop == 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(optimizer, poison):
    run = Run(name=optimizer)
    run.take(batch(*ROWS))
    hook = run.model.model.norm.weight.register_hook(lambda gradient: gradient * poison)
    before = snapshot(run.model, run.optimizers)
    results = [run.take(batch(*ROWS)) for _ in range(2)]
    assert [(r.skipped, r.skipped_in_a_row) for r in results] == [(1, 1), (1, 2)]
    assert not math.isfinite(results[0].grad_norm) and math.isfinite(results[0].loss)
    assert_identical(snapshot(run.model, run.optimizers), before)
    hook.remove()
    good = run.take(batch(*ROWS))
    assert (good.skipped, good.skipped_in_a_row) == (0, 0)
    moved = snapshot(run.model, run.optimizers)
    assert all(torch.isfinite(value).all() for value in moved.values())
    assert not torch.equal(moved["model.norm.weight"], before["model.norm.weight"])


def test_a_step_without_targets():
    run = Run()
    result = run.take(batch(row(*[1] * 24)))
    assert result.targets == 0 and math.isnan(result.loss) and result.grad_norm == 0 and result.skipped == 0


def test_validation():
    run, batches = Run(), [batch(ROWS[0], ROWS[1]), batch(ROWS[2])]
    before = snapshot(run.model, run.optimizers)
    nll, targets = validation_nll(run.model, batches, one_process())
    assert targets == 23 + 3 + 21
    assert nll / targets == pytest.approx(run.take(batch(*ROWS[:3])).loss, rel=1e-6)
    assert run.model.training and all(not value.requires_grad for value in before.values())


def test_validation_leaves_compiled_blocks_to_the_size_of_training():
    """Its last batch is smaller: a compiler that has met two sizes makes slower graphs, for any size."""
    run, sizes = Run(), []

    def compiler(graph, inputs):
        sizes.extend(x.shape[1] for x in inputs if isinstance(x, torch.Tensor) and x.ndim == 3 and x.shape[-1] == 16)
        return graph

    for block in run.model.model.layers:
        block.compile(backend=compiler)
    validation_nll(run.step.model, [batch(*ROWS[:2]), batch(ROWS[2])], one_process())
    assert sizes == []
    run.take(batch(*ROWS[:2]))
    assert sizes and {type(size) for size in sizes} == {int}


def report_of(tmp_path, max_skipped_steps: int, late: int = 0) -> Report:
    tracker = Tracker(TrackConfig(), "run", tmp_path)
    tracker.start(one_process().accelerator)
    state = TrainState()
    return Report(
        RunConsole(False),
        tracker,
        Throughput(),
        "run",
        tmp_path,
        state,
        steps=100,
        tokens_per_step=24,
        log_every=1,
        max_skipped_steps=max_skipped_steps,
        late=late,
        is_main=True,
        resumed_step=None,
    )


@pytest.mark.parametrize("late", [0, 1])
def test_several_in_a_row_end_the_run(tmp_path, late):
    run, report = Run(), report_of(tmp_path, 3, late)
    poison = 1.0
    run.model.model.norm.weight.register_hook(lambda gradient: gradient * poison)
    with pytest.raises(TrainingStopped, match=r"not finite 3 steps in a row, up to step 6: lower optim\.lr"):
        for step in range(1, 20):
            poison = 1.0 if step in (1, 3) else float("nan")  # one alone, then three
            report.step(step, 0.1, run.step([batch(*ROWS)], 1.0, False))
    assert step == 6 + late
    assert report.state.skipped == 4
    assert report.state.tokens == 6 * 68
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 2, 3, 4]
    assert math.isnan(rows[1]["grad_norm"]) and math.isfinite(rows[2]["grad_norm"])


def test_figures_come_late_and_flush_brings_them(tmp_path):
    run, report = Run(), report_of(tmp_path, 3, late=1)
    for step in (1, 2, 3):
        report.step(step, 0.1, run.step([batch(*ROWS)], 1.0, step == 2))
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == step - 1
    assert report.stop_agreed
    report.flush()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_profiler_that_saw_nothing_is_a_warning(tmp_path):
    report, out = report_of(tmp_path, 3), io.StringIO()
    report.console = RunConsole(console=Console(file=out, width=200))
    report.kernel_times(5, None)
    assert out.getvalue().startswith("warning: no kernel times of step 5: the profiler saw no kernel;")
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_metrics_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match=r"metrics.jsonl could not be written") as caught:
        report_of(tmp_path / "file", 3)
    assert type(caught.value) is not RuntimeError  # one that train.py tells in a sentence


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_casts_are_never_stale(optimizer, monkeypatch):
    """Multiplied with casts to float32, a model learns as without them: they follow every update."""
    plain = Run(name=optimizer)
    expected = [plain.take(batch(*ROWS)).loss for _ in range(6)]
    monkeypatch.setattr("qlatrain.models.hybrid.cast_dtype", lambda device_type: torch.float32)
    cast = Run(name=optimizer)
    got = [cast.take(batch(*ROWS)).loss for _ in range(6)]
    assert all(joint.cast is not None for joint in cast.model.model.joints)
    assert got == pytest.approx(expected, rel=1e-4)
    assert expected[0] - expected[-1] > 0.1
