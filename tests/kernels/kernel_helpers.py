"""Inputs of the gated delta rule, and the comparison with the float64 reference that its tests share."""

import torch
import torch.nn.functional as F

from qlakernels import chunk_gated_delta_rule
from qlakernels.gated_delta_rule import recurrent_gated_delta_rule_reference

HEAD_DIM = {"initial_state": 1, "final_state": 1, "A_log": 0, "dt_bias": 0}  # 2 for everything [B, T, H, ...]
UNDERFLOW = 1e-30  # an error below this is no error: a strong decay takes the reference itself out of float32


def make_inputs(
    tokens: int,
    *,
    seed: int = 0,
    batch: int = 1,
    key_heads: int = 2,
    value_heads: int = 2,
    key_dim: int = 16,
    value_dim: int = 24,
    beta: float | str = "random",
    g: float | str = "random",
    documents: int | None = None,
) -> dict[str, torch.Tensor]:
    """Float32 arguments with unit keys, and an initial state for each document (`batch` of them unless given).

    beta: a number, or `random` in (0, 2). g: a number, `random` in (-1, 0), or `mixed`: -20 here, -1e-3 there.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=random)

    gates = (batch, tokens, value_heads)
    if g == "random":
        decay = -uniform(*gates)
    elif g == "mixed":
        decay = torch.where(uniform(*gates) < 0.2, -20.0, -1e-3)
    else:
        decay = torch.full(gates, float(g))
    return {
        "q": F.normalize(normal(batch, tokens, key_heads, key_dim), dim=-1),
        "k": F.normalize(normal(batch, tokens, key_heads, key_dim), dim=-1),
        "v": normal(batch, tokens, value_heads, value_dim),
        "g": decay,
        "beta": uniform(*gates) * 2 if beta == "random" else torch.full(gates, float(beta)),
        "initial_state": normal(batch if documents is None else documents, value_heads, key_dim, value_dim),
    }


def bounds_of(lengths: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def assert_close_by_head(name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """‖got − expected‖ ≤ tolerance · ‖expected‖, over the tensor and over each head by itself."""
    assert got.shape == expected.shape, f"{name}: {list(got.shape)} for {list(expected.shape)}"
    got, expected = got.detach().double(), expected.detach().double()
    assert got.isfinite().all(), f"{name} is not finite"
    heads = zip(got.unbind(HEAD_DIM.get(name, 2)), expected.unbind(HEAD_DIM.get(name, 2)), strict=True)
    for head, (x, reference) in [("all", (got, expected)), *enumerate(heads)]:
        error, size = (x - reference).norm().item(), reference.norm().item()
        assert error <= tolerance * size + UNDERFLOW, (
            f"{name}, head {head}: error {error:.2e} of {size:.2e}, relative {error / max(size, UNDERFLOW):.1e}"
        )


def outputs_and_gradients(function, inputs: dict[str, torch.Tensor], seed: int = 1, **options) -> dict:
    """o, the final state, and the gradient of each input under random cotangents that depend on `seed` alone."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    o, final_state = function(**leaves, **options)
    random = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(x.shape, generator=random).to(x.dtype) for x in (o, final_state)]
    gradients = torch.autograd.grad([o, final_state], list(leaves.values()), cotangents)
    return {"o": o, "final_state": final_state}, dict(zip(leaves, gradients, strict=True))


def assert_matches_reference(inputs: dict[str, torch.Tensor], tolerance: float = 1e-5, **options) -> None:
    """The torch backend, outputs and every gradient, against the reference in float64 on the same numbers."""
    reference_options = {name: value for name, value in options.items() if name != "cu_seqlens_cpu"}
    expected = outputs_and_gradients(
        recurrent_gated_delta_rule_reference, {name: x.double() for name, x in inputs.items()}, **reference_options
    )
    got = outputs_and_gradients(chunk_gated_delta_rule, inputs, backend="torch", output_final_state=True, **options)
    for name, x in got[0].items():
        assert_close_by_head(name, x, expected[0][name], tolerance)
    for name, x in got[1].items():
        assert x.dtype == inputs[name].dtype
        try:
            assert_close_by_head(name, x, expected[1][name], tolerance)
        except AssertionError as error:
            raise AssertionError(f"gradient of {error}") from None
