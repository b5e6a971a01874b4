"""The kernels as they are compiled: built side by side at first use, kept in the disk cache, found without tilelang.

A kernel is known by a key: its name, then what its maker takes, all strings, numbers and booleans. Where it lies in the
cache follows from the key, from the sources of its package and from tilelang's version, so that nothing has to be
traced, nor tilelang imported, to find it: a process that finds all it needs loads tilelang's runtime, and no more.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import tvm_ffi
from tqdm import tqdm

UNIFORM_WARPGROUPS = "qlakernels.uniform_warpgroups"  # a pass config of ours: see `compiling._uniform_warpgroups`


class Maker(NamedTuple):
    """Where the function is that makes a kernel, and what it is compiled with.

    package: that the kernel's sources make up, without the modules in `host`, which no kernel is made from.
    known_by: the module whose import makes the kernel known, for the processes that compile.
    """

    package: str
    module: str
    function: str
    pass_configs: dict
    host: frozenset[str]
    known_by: str


_makers: dict[str, Maker] = {}
_slowest: set[str] = set()
_functions: dict[tuple, Callable] = {}
_lock = Lock()


def add_kernels(
    known_by: str,
    makers: dict[str, str],
    pass_configs: dict[str, dict],
    host: Collection[str] = (),
    slowest: Iterable[str] = (),
) -> None:
    """Makes kernels known by name. To be called where `known_by`, a module without tilelang, is imported.

    makers: "module.function" in the package of that module, by the kernel's name. pass_configs: by name, where there
    are any. slowest: the names of those to begin with.
    """
    package, own_name = known_by.rpartition(".")[::2]
    host = frozenset(host) | {own_name}
    for name, place in makers.items():
        assert name not in _makers, f"two kernels are named {name}"
        module, function = place.split(".")
        _makers[name] = Maker(package, module, function, pass_configs.get(name, {}), host, known_by)
    _slowest.update(slowest)


def maker_of(key: tuple) -> Maker:
    return _makers[key[0]]


def load(needed: Iterable[tuple]) -> None:
    """Makes kernels ready for `launcher`, side by side: hundredths of a second each from the cache, else 5 to 40 s.

    Raises:
        RuntimeError: a kernel does not compile.
    """
    with _lock:
        missing = [key for key in dict.fromkeys(needed) if key not in _functions]
        fresh = [key for key in missing if not library(key).exists()]
        if fresh:
            _compile_all(fresh)
        for key in missing:
            if key not in _functions:
                _functions[key] = _load_library(library(key))


def launcher(key: tuple) -> Callable:
    """The function that launches the kernel of a key, without the Python that tilelang wraps around it.

    That Python (5 µs a call) makes outputs, of which our kernels return none. The function itself checks the number,
    dtypes, shapes, strides and device of its arguments, and takes the current stream of the tensors' device.
    """
    load([key])
    return _functions[key]


def launchers(keys: dict[str, tuple]) -> dict[str, Callable]:
    """`launcher` of each, by name."""
    load(keys.values())
    return {name: _functions[key] for name, key in keys.items()}


def cache_directory() -> Path:
    """tilelang's, as it finds it."""
    return Path(os.environ.get("TILELANG_CACHE_DIR") or Path("~/.tilelang/cache").expanduser())


def library(key: tuple) -> Path:
    """Where the key's kernel lies, as these sources make it, once it is compiled."""
    maker = maker_of(key)
    text = repr((key, _version(), sources_digest(maker.package, maker.host), maker.pass_configs))
    return cache_directory() / "qlakernels" / f"{hashlib.sha256(text.encode()).hexdigest()}.so"


@cache
def sources_digest(package: str, host: frozenset[str]) -> str:
    """Of the modules of a package but those in `host`."""
    (folder,) = importlib.util.find_spec(package).submodule_search_locations
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.py")):
        if path.stem not in host:
            digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _version() -> str:
    return importlib.metadata.version("tilelang")


@cache
def _load_runtime() -> None:
    """What compiled kernels call: the very libraries that tilelang would load itself, 0.1 s where its import takes 1.

    Where tilelang is imported, before or after, they are loaded once.
    """
    folder = Path(importlib.util.find_spec("tilelang").origin).parent / "lib"
    for name in ("libtvm_runtime.so", "libtilelang.so"):
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)


def _load_library(path: Path) -> Callable:
    _load_runtime()
    return tvm_ffi.load_module(str(path)).get_function("main", query_imports=True)


def _compile_all(keys: list[tuple]) -> None:
    """By a process that imports tilelang once and becomes as many as there are cores; here where there is no Python to
    start."""
    keys = sorted(keys, key=lambda key: key[0] not in _slowest)
    with (
        tqdm(desc="compiling Hopper kernels", total=len(keys), delay=2.0, unit="kernel") as progress,
        closing(_compile_aside(keys) if sys.executable else _compile_here(keys)) as done,
    ):
        for number, error in done:
            if error:
                raise RuntimeError(f"the kernel {keys[number]} does not compile: {error}")
            progress.update()


def _compile_here(keys: list[tuple]) -> Iterator[tuple[int, str | None]]:
    """The number of each kernel once it is in the cache, and what was wrong if it is not."""
    from qlakernels.compiling import try_to_compile

    for number, key in enumerate(keys):
        yield number, try_to_compile(key)


def _compile_aside(keys: list[tuple]) -> Iterator[tuple[int, str | None]]:
    """As `_compile_here`, in any order."""
    # No devices: what has been forked may not use them, and a compilation does not.
    variables = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    wanted = [(maker_of(key).known_by, key) for key in keys]
    reading, writing = os.pipe()
    with open(reading) as reports, tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as wanted_file:
        json.dump(wanted, wanted_file)
        wanted_file.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-m", "qlakernels.compiling", str(writing)],
            env=variables,
            stdin=wanted_file,
            stdout=said,
            stderr=said,
            pass_fds=(writing,),
            process_group=0,
        )
        os.close(writing)
        try:
            reported = 0
            for line in reports:
                reported += 1
                yield tuple(json.loads(line))
            if process.wait() or reported < len(keys):
                said.seek(0)
                lines = said.read().strip().splitlines() or [f"it ended with {process.returncode} and no message"]
                raise RuntimeError(f"the process that compiles kernels failed: {lines[-1]}")
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                process.wait()
