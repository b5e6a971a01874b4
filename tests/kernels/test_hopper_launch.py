"""What compiled kernels say of the arguments that the operator launches them with, where there is no GPU.

A compiled kernel checks number, dtypes, shapes and strides of its arguments before anything else, and asks for the
driver only then. Here tensors of the CPU are handed over as if they were on a GPU: it must come as far as the driver.
"""

import ctypes
import shutil

import pytest
import torch
import tvm_ffi

from qlakernels.gated_delta_rule.hopper import operator

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels would run, on addresses of the CPU"),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH: nothing can be compiled here"),
]
NO_DRIVER = "CUDA driver version is insufficient"
CUDA = 2  # as DLPack numbers devices
pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class OnGPU:
    """A tensor as DLPack hands it over, with another device written in: behind the address of its numbers."""

    def __init__(self, x: torch.Tensor):
        self.x = x

    def __dlpack__(self, **options):
        capsule = torch.utils.dlpack.to_dlpack(self.x)
        ctypes.c_int32.from_address(pointer_of(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)).value = CUDA
        return capsule

    def __dlpack_device__(self):
        return CUDA, 0


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """The kernels that came as far as the driver."""
    names, launchers = [], operator._launchers

    def launching(name, launch):
        def run(*arguments):
            arguments = (tvm_ffi.from_dlpack(OnGPU(x)) if isinstance(x, torch.Tensor) else x for x in arguments)
            with pytest.raises(Exception, match=NO_DRIVER):
                launch(*arguments)
            names.append(name)

        return run

    monkeypatch.setattr(operator, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(
        operator, "_launchers", lambda *a: {name: launching(name, launch) for name, launch in launchers(*a).items()}
    )
    return names


def heads_first(x):
    return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


def slices(*tensors):
    """The same side by side in one tensor."""
    sizes = [x.shape[2] * x.shape[3] for x in tensors]
    together = torch.cat([x.flatten(2) for x in tensors], -1).split(sizes, -1)
    return tuple(part.unflatten(-1, x.shape[2:]) for part, x in zip(together, tensors, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "heads first", "slices"])
@pytest.mark.parametrize(("batch", "tokens", "key_heads", "heads"), [(1, 1, 1, 1), (1, 130, 1, 3), (2, 65, 2, 4)])
def test_forward_and_backward(batch, tokens, key_heads, heads, layout, launched):
    of_keys, of_values = (batch, tokens, key_heads, 128), (batch, tokens, heads, 128)
    q, k, v = (torch.zeros(shape, dtype=torch.bfloat16) for shape in (of_keys, of_keys, of_values))
    if layout == "heads first":
        q, k, v = (heads_first(x) for x in (q, k, v))
    elif layout == "slices":
        q, k, v = slices(q, k, v)
    raw = [torch.zeros(batch, tokens, heads, dtype=torch.bfloat16) for _ in range(2)]
    parameters = torch.zeros(heads), torch.zeros(heads)
    cuts = [None] if batch > 1 else [None, torch.tensor([0, tokens, tokens], dtype=torch.int32)]
    for cu_seqlens in cuts:
        documents = batch if cu_seqlens is None else 2
        for state in (None, torch.zeros(documents, heads, 128, 128)):
            with_state, options = state is not None, (True, True, True, False)
            o, final_state, W, states, first_states, order = operator._forward(
                q, k, v, *raw, cu_seqlens, *parameters, state, 1.0, with_state, *options, True
            )
            operator._backward(
                q, k, *raw, W, states, first_states, o, final_state if with_state else None, cu_seqlens, order,
                *parameters, with_state, 1.0, *options, v.stride(),
            )  # fmt: skip
            found = [name for name in launched if name != "boundaries"]
            assert found == ["forward", "reverse", "gradients", "gate_gradients"]
            assert len(launched) - len(found) == (cu_seqlens is not None)
            launched.clear()


def test_a_wrong_argument_is_told(launched, monkeypatch):
    """Else the test above could not fail."""
    in_pieces = operator._in_pieces
    monkeypatch.setattr(operator, "_in_pieces", lambda x: (in_pieces(x)[0].float(), in_pieces(x)[1]))
    with pytest.raises(AssertionError, match="dv_again dtype mismatch"):
        test_forward_and_backward(1, 1, 1, 1, "contiguous", launched)
