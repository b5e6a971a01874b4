"""The AdamW update of one tensor in one pass, with the half-precision cast of what it leaves."""

from qlakernels.adamw.hopper.operator import update

__all__ = ["update"]
