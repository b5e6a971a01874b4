"""Counts what qlakernels is asked for, and sees that no test leaves transformers changed."""

from collections import Counter

import pytest
from transformers_helpers import inside_transformers

import qlakernels
from qlatrain.integrations.transformers import replace


@pytest.fixture(autouse=True)
def _left_as_found():
    before = inside_transformers()
    yield
    assert inside_transformers() == before
    assert not replace._held and not replace._everywhere


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """How often each operator of qlakernels was called."""
    counted = Counter()

    def counting(name, operator):
        def run(*args, **kwargs):
            counted[name] += 1
            return operator(*args, **kwargs)

        return run

    for name in ("causal_conv1d", "chunk_gated_delta_rule", "rms_norm_gated"):
        monkeypatch.setattr(qlakernels, name, counting(name, getattr(qlakernels, name)))
    return counted
