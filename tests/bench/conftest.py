import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from qlakernels import backends
from qlakernels.backends import Backend, register
from qlatrain.bench.floors import Ceilings

OPERATOR = "gated_delta_rule"


@pytest.fixture
def ceilings() -> Ceilings:
    """Of an H100, as measured once."""
    return Ceilings(798e12, "a product", 3.0e12, "a copy")


@pytest.fixture
def altered_backend(monkeypatch):
    """Registers a backend that is the torch one, but for what is done to the tensors on their way.

    `altered_backend(name, outputs=f, leaf=("beta", g))`: f changes the output, g the gradient of an input.
    """
    registry = {operator: dict(found) for operator, found in backends._registry.items()}
    monkeypatch.setattr(backends, "_registry", registry)
    monkeypatch.setattr(backends, "_decided", {})

    def add(name: str, output=lambda o: o, leaf: tuple | None = None) -> None:
        run = registry[OPERATOR]["torch"].run

        def altered(**arguments) -> tuple[torch.Tensor, torch.Tensor | None]:
            if leaf is not None:
                key, change = leaf
                arguments[key] = arguments[key].view_as(arguments[key])
                if arguments[key].requires_grad:
                    arguments[key].register_hook(change)
            o, state = run(**arguments)
            return output(o), state

        register(OPERATOR, Backend(name, lambda call: None, altered))

    return add
