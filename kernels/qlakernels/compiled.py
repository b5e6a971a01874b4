"""Kernels of further operators in the loader and cache of the gated delta rule's, `gated_delta_rule.hopper.kernels`.

Their sources are not among those that the cache of that module knows its kernels by, so a key carries a digest of them:
(name, what the maker takes …, digest). With such a key `load`, `launcher`, `kernel` and `resources` work as with any.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

from qlakernels.gated_delta_rule.hopper.kernels import MAKERS, PASS_CONFIGS, launcher, load


def add_kernel(name: str, maker: Callable, sources: list[str], pass_configs: dict) -> Callable[..., tuple]:
    """Makes `maker` known under `name`, once; sources: the files that it is made from.

    Returns the function from what the maker takes to the key of a specialisation.
    """
    assert name not in MAKERS, f"two kernels are named {name}"
    MAKERS[name] = lambda *options: maker(*options[:-1])
    PASS_CONFIGS[name] = pass_configs
    paths = tuple(sources)
    return lambda *options: (name, *options, _digest(paths))


def launchers(keys: dict[str, tuple]) -> dict[str, Callable]:
    """What launches each, by name; compiled one after the other where they are not in the cache, seconds each.

    Raises:
        RuntimeError: a kernel does not compile.
    """
    for key in keys.values():
        load([key])  # the processes that compile several at once know only the gated delta rule's
    return {name: launcher(key) for name, key in keys.items()}


@cache
def _digest(paths: tuple[str, ...]) -> str:
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()
