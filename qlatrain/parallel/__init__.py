"""How a model is laid over devices."""

from qlatrain.parallel.layout import Layout

__all__ = ["Layout"]
