import json
import time

import pytest
import torch

from qlatrain.metrics import hardware


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("Tesla T4", None),
    ],
)
def test_known_names(name, peak):
    assert hardware.known_bf16_peak(name) == peak


def test_data_sheet_for_bf16_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(hardware, "measured_flops", lambda device, dtype: (1.0, "measured"))
    flops, how = hardware.peak_flops("cuda", torch.bfloat16)
    assert flops == 989.4e12 and "data sheet" in how and "H100" in how
    assert hardware.peak_flops("cuda", torch.float32) == (1.0, "measured")


def test_measured_on_the_cpu():
    state, start = torch.get_rng_state(), time.perf_counter()
    flops, how = hardware.peak_flops("cpu", torch.float32)
    assert time.perf_counter() - start < 5  # half a second on a quiet machine
    assert torch.equal(torch.get_rng_state(), state)
    assert 1e8 < flops < 1e14
    assert "measured" in how and "float32" in how and "x" in how
    size = int(how.split("product ")[1].split("x")[0])
    a = torch.randn(size, size)
    start = time.perf_counter()
    for _ in range(3):
        a @ a
    # the machine may be busy: a wrong count of operations or a wrong unit is off by more
    assert 0.2 < flops * (time.perf_counter() - start) / (3 * 2 * size**3) < 20


def test_environment_is_json():
    found = json.loads(json.dumps(hardware.environment()))
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["versions"]) == set(hardware.PACKAGES)
    assert found["cpu_cores"] >= 1 and found["hostname"] and found["command"]
    assert found["time"].endswith("+00:00")


def test_git_state(tmp_path, monkeypatch):
    def git(*words):
        assert (
            hardware._output(["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y", *words])
            is not None
        )

    file = tmp_path / "file.py"
    file.write_text("1")
    assert hardware._git_state(file) == (None, None)
    monkeypatch.setenv("QLATRAIN_COMMIT", "abc")
    assert hardware._git_state(file) == ("abc", None)
    monkeypatch.delenv("QLATRAIN_COMMIT")
    git("init")
    # inside a repository that does not track it, as in a virtual environment
    assert hardware._git_state(file) == (None, None)
    git("add", "file.py")
    git("commit", "-m", "one")
    commit, dirty = hardware._git_state(file)
    assert len(commit) == 40 and dirty is False
    file.write_text("2")
    assert hardware._git_state(file) == (commit, True)
