import logging

import pytest

from qlatrain.bench.fla_dispatch import LOGGER, SWITCH, FlaDispatch


@pytest.fixture
def dispatch(monkeypatch):
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setattr(FlaDispatch, "_instance", None)
    logger = logging.getLogger(LOGGER)
    monkeypatch.setattr(logger, "handlers", [])
    return FlaDispatch.switched_off()


def test_switched_off_once(dispatch):
    import os

    assert os.environ[SWITCH] == "0"
    assert FlaDispatch.switched_off() is dispatch
    assert dispatch.note() == f"{SWITCH}=0, so that FLA runs its own kernels and not FlashQLA's"
    dispatch.check()


def test_what_fla_chose_is_noted(dispatch):
    logging.getLogger(LOGGER).info("[FLA Backend] gated_delta_rule.f -> flash_qla rejected: no GPU")
    dispatch.check()
    logging.getLogger(LOGGER).info("[FLA Backend] common.chunk_bwd_dqkwg -> tilelang")
    assert dispatch.note().endswith("; FLA itself chose common.chunk_bwd_dqkwg -> tilelang")
    dispatch.check()
    logging.getLogger(LOGGER).info("[FLA Backend] gated_delta_rule.chunk_gated_delta_rule -> flash_qla")
    with pytest.raises(RuntimeError, match="FLA handed the call to FlashQLA"):
        dispatch.check()
