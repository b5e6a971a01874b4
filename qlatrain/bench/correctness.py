"""The gate that a row has to pass before its speed counts."""

import torch

from qlatrain.bench.operators import Problem


def errors(problem: Problem, results: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> dict[str, float]:
    """‖x − reference‖ / ‖reference‖ of each tensor, on the part that the reference covers; NaN where x holds one."""
    found = {}
    for name, result in results.items():
        expected = reference[name]
        difference = problem.covered(name, result).to(expected.dtype) - expected
        norms = [torch.linalg.vector_norm(x, dtype=torch.float64).item() for x in (difference, expected)]
        found[name] = norms[0] / norms[1] if norms[1] else norms[0]
    return found


def verdict(found: dict[str, float], bars: dict[str, float]) -> str | None:
    """None when every error is within its bar; else what is wrong, the worst first."""
    # written so that a NaN is over every bar
    over = [(error / bars[name], name, error) for name, error in found.items() if not error <= bars[name]]
    if not over:
        return None
    worst = sorted(over, key=lambda item: (item[0] == item[0], -item[0]))
    return "wrong: " + ", ".join(f"{name} is off by {error:.1e}, bar {bars[name]:.1e}" for _, name, error in worst)
