"""The record of errors: with QLATRAIN_ERRORS_JSON set, the worst of each test and tensor is written to that file.

Under pytest-xdist each worker writes a file of its own, with its name behind.
"""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def error_record():
    yield
    if path := os.environ.get("QLATRAIN_ERRORS_JSON"):
        import hopper_helpers

        worker = os.environ.get("PYTEST_XDIST_WORKER", "")
        hopper_helpers.write_record(path + (f".{worker}" if worker else ""))
