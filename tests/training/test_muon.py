import pytest
import torch
from training_helpers import assert_identical

from qlatrain.training.muon import Muon, orthogonalise

SHAPES = [(24, 24), (48, 16), (16, 48)]  # square, tall, wide


def random_matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """The published iteration for one matrix, in float64 and as it is written in the article."""
    x = matrix.double()
    x = x / x.norm()
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x if wide else x.T


class PlainMuon:
    """One matrix, one line an operation."""

    def __init__(self, weight: torch.Tensor, lr: float, momentum: float, weight_decay: float):
        self.weight, self.buffer = weight.double(), torch.zeros_like(weight).double()
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay

    def step(self, gradient: torch.Tensor) -> None:
        gradient = gradient.double()
        self.buffer = self.momentum * self.buffer + (1 - self.momentum) * gradient
        update = plain_orthogonalise((1 - self.momentum) * gradient + self.momentum * self.buffer)
        rows, columns = self.weight.shape
        update = update * max(1, rows / columns) ** 0.5
        self.weight = self.weight * (1 - self.lr * self.weight_decay) - self.lr * update


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_singular_values_come_near_one(shape, scale):
    matrices = torch.stack([random_matrix(*shape, seed=seed) for seed in range(5)]) * scale
    result = orthogonalise(matrices)
    singular = torch.linalg.svdvals(result)
    assert singular.max() < 1.25
    # the smallest of a square random matrix starts at almost nothing, and five steps lift it only so far
    assert (singular > 0.6).float().mean() > 0.9
    assert result.shape == matrices.shape


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_vectors_stay(shape):
    """U f(Σ) Vᵀ with the polynomial's f, so Uᵀ X V is diagonal."""
    matrix = random_matrix(*shape).double()
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ orthogonalise(matrix[None].float())[0].double() @ v.T
    assert (inner - inner.diagonal().diag()).abs().max() < 1e-4
    assert inner.diagonal().min() > 0


def test_batched_is_one_by_one():
    matrices = torch.stack([random_matrix(20, 12, seed=seed) for seed in range(4)])
    for matrix, result in zip(matrices, orthogonalise(matrices), strict=True):
        torch.testing.assert_close(result, plain_orthogonalise(matrix).float(), atol=1e-5, rtol=1e-4)


def test_zero_gradient_is_no_update():
    assert torch.equal(orthogonalise(torch.zeros(2, 4, 3)), torch.zeros(2, 4, 3))


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_matches_the_plain_implementation(weight_decay):
    """Matrices of several shapes together, two of each, against each alone."""
    weights = [random_matrix(*shape, seed=i) for i, shape in enumerate(SHAPES * 2)]
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    plain = [PlainMuon(weight, 0.05, 0.9, weight_decay) for weight in weights]
    muon = Muon(parameters, lr=0.05, momentum=0.9, weight_decay=weight_decay)
    for step in range(4):
        for i, (parameter, reference) in enumerate(zip(parameters, plain, strict=True)):
            parameter.grad = random_matrix(*parameter.shape, seed=100 * step + i)
            reference.step(parameter.grad)
        muon.step()
    for parameter, reference, start in zip(parameters, plain, weights, strict=True):
        torch.testing.assert_close(parameter.detach(), reference.weight.float(), atol=1e-4, rtol=1e-4)
        assert (parameter - start).abs().max() > 0.02


@pytest.mark.parametrize("shape", SHAPES)
def test_same_direction_as_torch(shape):
    """torch.optim.Muon computes in bfloat16, so to a few parts in a hundred."""
    start = random_matrix(*shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizers = [Muon([ours], lr=0.02), torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0)]
    for step in range(3):
        for parameter in (ours, theirs):
            parameter.grad = random_matrix(*shape, seed=step + 1)
        for optimizer in optimizers:
            optimizer.step()
    moved_ours, moved_theirs = (ours - start).detach(), (theirs - start).detach()
    assert torch.cosine_similarity(moved_ours.flatten(), moved_theirs.flatten(), dim=0) > 0.99
    assert moved_ours.norm() / moved_theirs.norm() == pytest.approx(1, abs=0.1)


def test_tall_matrices_take_larger_steps():
    moves = {}
    for shape in ((16, 16), (64, 16), (16, 64)):
        parameter = torch.nn.Parameter(torch.zeros(shape))
        parameter.grad = random_matrix(*shape)
        Muon([parameter], lr=1.0).step()
        moves[shape] = torch.linalg.svdvals(parameter.detach()).median().item()
    assert moves[64, 16] == pytest.approx(2 * moves[16, 64], rel=0.2)
    assert 0.6 < moves[16, 16] < 1.25 and 0.6 < moves[16, 64] < 1.25


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.0])
def test_a_step_left_out_leaves_all_as_it_was(bad):
    parameters = [torch.nn.Parameter(random_matrix(8, 6, seed=seed)) for seed in range(2)]
    muon = Muon(parameters, lr=0.1, weight_decay=0.5)

    def take(seed: int, found: float) -> None:
        for parameter in parameters:
            parameter.grad = random_matrix(8, 6, seed=seed)
        if found:
            parameters[0].grad[0, 0] = bad
        muon.found_inf = torch.tensor(found)
        muon.step()

    def all_of_it() -> dict[str, torch.Tensor]:
        kept = {f"weight {i}": p.detach().clone() for i, p in enumerate(parameters)}
        return kept | {f"momentum {i}": muon.state[p]["momentum_buffer"].clone() for i, p in enumerate(parameters)}

    take(1, 0.0)
    before = all_of_it()
    take(2, 1.0)
    assert_identical(all_of_it(), before)
    take(2, 0.0)
    assert not torch.equal(parameters[1], before["weight 1"])


def test_parameters_without_a_gradient_stay():
    first, second = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    first.grad = random_matrix(4, 4)
    Muon([first, second], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(second, torch.ones(4, 4)) and not torch.equal(first, torch.ones(4, 4))
