"""The AdamW kernel compiles for sm_90a without a GPU, and spills nothing. Needs nvcc."""

import shutil

import pytest
import torch

from qlakernels.adamw import update
from qlakernels.adamw.hopper.kernels import specialisation
from qlakernels.adamw.hopper.operator import blocks_of
from qlakernels.adamw.hopper.sizes import AHEAD, BLOCKS, PIECE, THREADS
from qlakernels.compiled import launcher, library
from qlakernels.compiling import kernel
from qlakernels.gated_delta_rule.hopper.resources import resources

REGISTERS = 2**16  # of a multiprocessor


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH: the kernel cannot be compiled here")
@pytest.mark.parametrize(
    ("cast", "gradient"),
    [("bfloat16", "float32"), ("float16", "float32"), ("none", "float32"), ("bfloat16", "bfloat16")],
)
def test_resources(cast, gradient):
    key = specialisation(cast, gradient)
    found = resources(key)
    assert found.spilled == 0 and found.shared == 0
    assert 0 < found.registers * THREADS * BLOCKS <= REGISTERS
    assert AHEAD * 4 * 16 * THREADS * BLOCKS >= 48 * 1024  # bytes on their way, a multiprocessor
    source = kernel(key).get_kernel_source()
    for name in "pmv":
        assert f"*(float4*)({name} +" in source and f"= *(float4*)({name} +" in source  # written and read
    piece = "*(float4*)(g +" if gradient == "float32" else "*(uint2*)(g +"
    assert f"= {piece}" in source and piece not in source.replace(f"= {piece}", "")
    assert ("*(uint2*)(casts +" in source) == (cast != "none")
    assert source.index(piece) < source.index("powf") < source.index("sqrtf(vs")
    assert callable(launcher(key)) and library(key).exists()


def test_blocks():
    block = AHEAD * THREADS * PIECE
    for size, blocks in ((1, 1), (3, 1), (block, 1), (block + 3, 1), (block + 4, 2), (2**32, 2**32 // block)):
        assert blocks_of(size) == blocks


def arguments() -> dict:
    tensors = {name: torch.zeros(4, 6) for name in ("p", "m", "v", "g")}
    numbers = {name: torch.zeros(1) for name in ("step", "factor", "skip")}
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    return tensors | {"cast": torch.zeros(4, 6).bfloat16()} | numbers | settings


@pytest.mark.parametrize("name", ["p", "m", "v", "g", "cast"])
def test_tensors_that_do_not_fit(name):
    good = arguments()[name]
    flat = torch.zeros(25, dtype=good.dtype)
    for bad, said in (
        (good.double(), "float64"),
        (good.T.contiguous().T, "strides"),
        (flat[1:].view(4, 6), "past a multiple"),
        (good.to("meta"), "on meta"),
        (good[:, :5].contiguous(), "shape"),
    ):
        if name == "p" and said in ("shape", "on meta"):
            continue  # then the others do not fit
        with pytest.raises(ValueError, match=rf"^{name} .*{said}"):
            update(**arguments() | {name: bad})


@pytest.mark.parametrize("name", ["step", "factor", "skip"])
def test_numbers_that_do_not_fit(name):
    for bad in (torch.zeros(2), torch.zeros(1).double(), torch.zeros(1, device="meta")):
        with pytest.raises(ValueError, match=rf"^{name} is a .* give one torch.float32 number on cpu"):
            update(**arguments() | {name: bad})


def test_no_gpu_and_nothing_to_do():
    with pytest.raises(ValueError, match="p is on cpu: the update needs a Hopper GPU"):
        update(**arguments())
    update(**arguments() | {name: torch.zeros(0, 3) for name in ("p", "m", "v", "g")} | {"cast": None})
