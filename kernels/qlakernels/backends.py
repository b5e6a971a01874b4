"""Which implementation runs, and why, said aloud.

An operator registers its backends in order of preference. `select` takes the first that can run the call, or the
one that was asked for, and logs one line per distinct decision. There is no silent fallback: a backend that was
asked for by name and cannot run raises.
"""

import difflib
import importlib.metadata
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

logger = logging.getLogger("qlakernels")


@dataclass(frozen=True)
class Call:
    """What decides whether a backend can run: shapes, dtypes and options, never the values of tensors."""

    device: torch.device
    dtype: torch.dtype
    key_dim: int
    value_dim: int
    options: frozenset[str] = frozenset()  # names of the in-operator options that are switched on
    needs_grad: bool = False
    width: int = 0  # taps of a short convolution


@dataclass(frozen=True)
class Backend:
    """`refuses(call)` returns None when this backend can run the call, otherwise the reason in a few words."""

    name: str
    refuses: Callable[[Call], str | None]
    run: Callable
    passed_over: str | None = None  # why auto leaves out what could run; asked for by name, it runs


class BackendRefused(ValueError):
    """A backend that was asked for by name cannot run the call; `reason` says why in a few words."""

    def __init__(self, operator: str, name: str, reason: str):
        super().__init__(f"backend={name!r} of {operator} cannot run here: {reason}; use backend='auto'")
        self.reason = reason


_registry: dict[str, dict[str, Backend]] = {}
# By operator: a graph of torch.compile's holds as long as the decisions it has looked at are those of when it was made,
# and the first of another operator, such as the loss behind the blocks, must not have every block traced again.
_decided: dict[str, dict[tuple[str, Call], str]] = {}
_said: set[str] = set()


def register(operator: str, backend: Backend) -> None:
    """Adds `backend` behind those that `operator` has: the order of registration is the order of preference."""
    _registry.setdefault(operator, {})[backend.name] = backend


def backend_names(operator: str) -> list[str]:
    return list(_registry[operator])


def is_passed_over(operator: str, name: str) -> bool:
    """Whether `auto` never takes this backend, which runs when asked for by name."""
    return _registry[operator][name].passed_over is not None


def select(operator: str, name: str, call: Call) -> Backend:
    """The backend that runs `call`.

    Raises:
        ValueError: `name` is not a backend of `operator`, or it was asked for and cannot run this call (then a
            BackendRefused).
    """
    backends = _registry[operator]
    decided, key = _decided.get(operator), (name, call)
    if decided is not None and key in decided:
        return backends[decided[key]]
    if name != "auto" and name not in backends:
        near = difflib.get_close_matches(name, ["auto", *backends], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"backend={name!r} is not a backend of {operator}: use auto, {', '.join(backends)}{hint}")
    if name != "auto":
        reason = backends[name].refuses(call)
        if reason is not None:
            raise BackendRefused(operator, name, reason)
        chosen, why = name, "asked for"
    else:
        refusals = {}
        for chosen, backend in backends.items():
            reason = backend.refuses(call) or backend.passed_over
            if reason is None:
                break
            refusals[chosen] = reason
        else:
            raise ValueError(f"no backend of {operator} can run this call: {_listed(refusals)}")
        why = f"not {_listed(refusals)}" if refusals else "first choice"
    line = f"{operator}: backend {chosen} on {call.device.type} ({why})"
    if line not in _said:
        _said.add(line)
        logger.info(line)
    _decided.setdefault(operator, {})[key] = chosen
    return backends[chosen]


def decisions() -> list[str]:
    """Every line said so far, for the record of a run."""
    return sorted(_said)


def _listed(refusals: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in refusals.items())


def installed(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def refused_by_hopper(call: Call) -> str | None:
    """Why no TileLang kernel for Hopper can run the call, whatever its shape; None where they can."""
    if call.device.type != "cuda":
        return f"needs a Hopper GPU, the tensors are on {call.device.type}"
    if torch.cuda.get_device_capability() != (9, 0):
        return f"needs compute capability 9.0, this GPU has {torch.cuda.get_device_capability()}"
    if installed("tilelang") is None:
        return "tilelang is not installed"
    if call.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {str(call.dtype).removeprefix('torch.')}"
    return None
