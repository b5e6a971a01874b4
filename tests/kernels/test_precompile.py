"""What is compiled ahead of time, without compiling it."""

import os
import subprocess
import sys

import pytest

from qlakernels import compiled, precompile


def names_of(arguments: list[str], monkeypatch, capsys) -> set[tuple]:
    needed = []
    monkeypatch.setattr(compiled, "load", needed.extend)
    monkeypatch.setattr(sys, "argv", ["precompile", *arguments])
    precompile.main()
    assert capsys.readouterr().out == f"{len(set(needed))} kernels are in the cache\n"
    assert len({compiled.library(key) for key in needed}) == len(set(needed))  # each is known, and has a place
    return set(needed)


def test_the_rule_alone(monkeypatch, capsys):
    keys = names_of(["--heads", "128/128", "96/192"], monkeypatch, capsys)
    assert {key[0] for key in keys} >= {"forward", "reverse", "gradients", "boundaries", "stitch_reverse"}
    assert {key[1:3] for key in keys if key[0].startswith("gradients")} == {(128, 128), (96, 192)}


def test_all_that_training_needs(monkeypatch, capsys):
    rule = names_of(["--gate"], monkeypatch, capsys)
    beside = names_of(["--gate", "--layers"], monkeypatch, capsys) - rule
    assert {key[0] for key in beside} == {
        "short_conv_forward",
        "short_conv_backward",
        "gated_norm_forward",
        "gated_norm_backward",
        "swiglu_forward",
        "swiglu_backward",
        "cross_entropy",
        "adamw_update",
    }
    assert ("gated_norm_backward", 128, "bfloat16", "float32", True) in beside


def test_the_residual_stream(monkeypatch, capsys):
    widths = names_of(["--hidden", "2048", "64"], monkeypatch, capsys) - names_of([], monkeypatch, capsys)
    assert {key[:2] for key in widths} == {
        (f"residual_norm_{direction}", width) for direction in ("forward", "backward") for width in (2048, 64)
    }
    whole = precompile.of_a_model(128, 128, 2048, "bfloat16")
    assert {key for key in widths if key[1] == 2048} <= set(whole)
    assert "residual_norm_forward" not in {key[0] for key in precompile.of_a_model(128, 128, 100, "bfloat16")}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arch", "sm_100a"], "--arch sm_100a has no kernels: use sm_90a"),
        (["--heads", "128"], "--heads 128 is not K/V, such as 128/128"),
        (["--hidden", "100"], "--hidden 100: the residual norm takes D a multiple of 8 up to 8192, not 100"),
        (["--heads", "80/128"], "--heads 80/128: K must be one of"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, said, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    done = subprocess.run([sys.executable, "-m", "qlakernels.precompile", *arguments], capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.startswith("error: " + said) and done.stderr.count("\n") == 1
