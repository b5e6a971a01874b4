"""GPU tests give memory back; with QLATRAIN_ERRORS_JSON set, the worst error of each test and tensor is written to that
file.

Under pytest-xdist each worker writes a file of its own, with its name behind.
"""

import os

import pytest


@pytest.fixture(autouse=True)
def memory_given_back(request):
    """Behind a GPU test: other processes run theirs on the same GPU."""
    yield
    if request.node.get_closest_marker("gpu"):
        import torch

        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


@pytest.fixture(scope="session", autouse=True)
def error_record():
    yield
    if path := os.environ.get("QLATRAIN_ERRORS_JSON"):
        import hopper_helpers

        if not hopper_helpers.worst_errors:
            return  # a file of that name may be another run's
        worker = os.environ.get("PYTEST_XDIST_WORKER", "")
        hopper_helpers.write_record(path + (f".{worker}" if worker else ""))
