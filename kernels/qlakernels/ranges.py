"""A name around what is launched, for whoever reads a profiler's trace."""

from contextlib import AbstractContextManager, nullcontext

import torch


def named_range(name: str) -> AbstractContextManager:
    """While a torch profiler records, a range of this name in its trace; else, and inside torch.compile, nothing."""
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return nullcontext()
    return torch.profiler.record_function(name)
