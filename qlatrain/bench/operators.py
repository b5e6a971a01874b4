"""The operators that can be measured."""

from typing import Protocol

import torch

from qlatrain.bench.floors import Work
from qlatrain.bench.gated_delta_rule import GatedDeltaRule
from qlatrain.bench.shapes import Shape


class Problem(Protocol):
    """An operator at one shape, with its inputs. Everything that differs from operator to operator is in here."""

    short: str  # the operator's name in keys such as `gdn/fwd/8x4096_16-32/tilelang/ms`
    shape: Shape
    leaves: dict[str, torch.Tensor]  # the inputs whose gradients are wanted
    cotangent: torch.Tensor  # of the output

    def __init__(self, shape: Shape, seed: int, dtype: torch.dtype, device: torch.device): ...

    def call(self, backend: str) -> torch.Tensor:
        """The output. Raises what the backend raises; `BackendRefused` where it does not take the call."""

    def reference(self, most_key_heads: int) -> tuple[dict[str, torch.Tensor], str]:
        """What `o` and each `dNAME` should be, on the part that `covered` gives, and how it was found.

        most_key_heads: that a large shape is checked on; 0 for all.
        """

    def covered(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The part of an output or gradient that the last `reference` is about."""

    def bars(self, backend: str) -> dict[str, float]:
        """The largest error ‖x − reference‖ / ‖reference‖ that each tensor may have."""

    def note(self, backend: str) -> str:
        """What was done so that the row measures what its name says; empty for nothing."""

    @staticmethod
    def work(shape: Shape, direction: str, element_bytes: int) -> Work:
        """What a direction cannot do without."""


OPERATORS: dict[str, type[Problem]] = {"gated_delta_rule": GatedDeltaRule}
