"""Paths, threads and the `gpu` mark, for every test."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
for package, folder in (("qlatrain", ROOT), ("qlakernels", ROOT / "kernels")):
    if importlib.util.find_spec(package) is None:  # run from a checkout that is not installed
        sys.path.insert(0, str(folder))

torch.set_num_threads(1)  # sums in one order, and no more of the machine than asked for


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        config.hook.pytest_deselected(items=on_gpu)
        items[:] = [item for item in items if item not in on_gpu]
