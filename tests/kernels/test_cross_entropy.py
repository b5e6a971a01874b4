"""Cross entropy: the plain form against torch, the kernel's arithmetic and lanes on a CPU, its resources, a GPU."""

import math
import shutil

import emulated
import pytest
import torch
import torch.nn.functional as F
from on_cpu import compile_for_cpu

from qlakernels.compiling import kernel
from qlakernels.cross_entropy import IGNORED, cross_entropy_
from qlakernels.cross_entropy.hopper import operator, passes
from qlakernels.cross_entropy.hopper.sizes import AHEAD, BLOCKS, PIECE, THREADS
from qlakernels.gated_delta_rule.hopper.resources import resources

SHAPES = [(1, 8, 8), (1, 8, 5), (7, 64, 64), (5, 136, 129), (4, 200, 100)]  # tokens, columns, words
WHOLE = AHEAD * THREADS * PIECE  # columns that a block holds
HALVES = [torch.bfloat16, torch.float16]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="the kernels cannot be compiled without nvcc")
PACKED = """
#include <limits>
#define CUDART_NAN_F NAN
using uchar = unsigned char;
namespace std {
template <> struct numeric_limits<__nv_bfloat16> { static __nv_bfloat16 infinity() { return INFINITY; } };
template <> struct numeric_limits<__half> { static __half infinity() { return INFINITY; } };
}
namespace tl {
template <class Pair> static Pair from_uint1(uint1 x) { return *(Pair*)&x; }
template <class Pair> static uint1 to_uint1(Pair x) { return *(uint1*)&x; }
template <class Pair> static Pair max2(Pair a, Pair b) { return __hmax2(a, b); }
}
"""


def draw(tokens, columns, words, dtype=torch.float32, scale=2.0):
    """Logits with NaN behind the words, and labels: the last word and the first among them, and none."""
    generator = torch.Generator().manual_seed(tokens + columns)
    logits = (torch.randn(tokens, columns, generator=generator) * scale).to(dtype)
    logits[:, words:] = torch.nan
    labels = torch.randint(words, (tokens,), generator=generator)
    labels[0] = words - 1
    labels[1:2] = IGNORED
    labels[2:3] = 0
    return logits, labels


def exact(logits, labels, words):
    """Losses and gradient in float64, by torch's own loss and autograd."""
    leaf = logits.double().requires_grad_()
    nll = F.cross_entropy(leaf[:, :words], labels, ignore_index=IGNORED, reduction="none")
    (gradient,) = torch.autograd.grad(nll.sum(), leaf)
    return nll.detach(), gradient


def assert_close(nll, gradient, logits, labels, words):
    expected, slope = exact(logits, labels, words)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), expected, rtol=1e-6, atol=1e-6)
    rounding = torch.finfo(logits.dtype).eps / 2
    torch.testing.assert_close(gradient.double(), slope, rtol=rounding + 2e-6, atol=3e-7)
    assert not gradient[:, words:].any() and not gradient[labels == IGNORED].any()


def plain(dtype, folder):
    return cross_entropy_


def one_thread(dtype, folder):
    """The kernel with one thread, as `cross_entropy_`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "THREADS", 1)
        patch.setattr(passes.T, "vectorized", passes.T.serial)  # the compiler knows no maximum of vectors
        launch = compile_for_cpu(passes.cross_entropy_kernel, dtype, monkeypatch=patch)

    def run(logits, labels, words, with_gradient):
        nll = torch.full(labels.shape, torch.nan)
        launch(logits.view(-1), labels, nll, logits.shape[1] // PIECE, words, int(with_gradient))
        return nll

    return run


def all_threads(dtype, folder):
    """The kernel as it is, with all its lanes, as `cross_entropy_`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulated, "BEFORE", emulated.BEFORE + PACKED)
        launch = emulated.emulate(("cross_entropy", dtype), THREADS, folder)

    def run(logits, labels, words, with_gradient):
        nll = torch.full(labels.shape, torch.nan)
        tensors = {"logits": logits, "labels": labels, "nll": nll}
        sizes = {"pieces": logits.shape[1] // PIECE, "words": words, "with_gradient": int(with_gradient)}
        launch(len(labels), tokens=len(labels), **tensors, **sizes)
        return nll

    return run


RUNS = [
    *((dtype, plain) for dtype in (torch.float32, torch.float64, *HALVES)),
    (torch.float32, one_thread),
    *(pytest.param((dtype, all_threads), marks=needs_nvcc) for dtype in HALVES),
]


@pytest.fixture(scope="module", params=RUNS, ids=lambda run: f"{run[0]}-{run[1].__name__}")
def dtype_and_run(request, tmp_path_factory):
    dtype, make = request.param
    name = str(dtype).removeprefix("torch.")
    return dtype, make(name, tmp_path_factory.mktemp(name))


@pytest.mark.parametrize("shape", [*SHAPES, (3, 3 * WHOLE + 64, 2 * WHOLE + 9)], ids=str)
def test_losses_and_gradient(shape, dtype_and_run):
    dtype, run = dtype_and_run
    logits, labels = draw(*shape, dtype=dtype)
    gradient = logits.clone()
    alone = run(gradient, labels, shape[2], False)
    assert torch.equal(gradient.nan_to_num(), logits.nan_to_num())
    nll = run(gradient, labels, shape[2], True)
    assert torch.equal(nll, alone)
    assert_close(nll, gradient, logits, labels, shape[2])


def test_labels_that_are_no_words(dtype_and_run):
    dtype, run = dtype_and_run
    logits, _ = draw(5, 128, 100, dtype=dtype)
    labels = torch.tensor([100, 3, -1, 2**40, IGNORED])
    logits[4, 7] = torch.inf
    gradient = logits.clone()
    nll = run(gradient, labels, 100, True)
    assert nll.isnan().tolist() == [True, False, True, True, False]
    assert gradient[[0, 2, 3], :100].isnan().all() and not gradient[1].isnan().any()
    assert nll[4] == 0 and not gradient[4].any() and not gradient[:, 100:].any()


@pytest.mark.parametrize("place", [0, 70, 99])
def test_logits_that_are_no_numbers(place, dtype_and_run):
    dtype, run = dtype_and_run
    logits, labels = draw(4, 128, 100, dtype=dtype)
    labels[:] = 71
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        logits[row, place] = value
    gradient = logits.clone()
    nll = run(gradient, labels, 100, True)
    assert nll.isnan().tolist() == [True, True, False, False]
    assert gradient[:2, :100].isnan().all() and not gradient[:, 100:].any()
    assert_close(nll[2:], gradient[2:], logits[2:], labels[2:], 100)
    assert gradient[2, place] == 0


def test_large_logits(dtype_and_run):
    """A constant that is added to a row leaves an error of no more than its own rounding."""
    dtype, run = dtype_and_run
    logits, labels = draw(6, 128, 128)
    logits = (logits + torch.tensor([0, 512, -512, 8192, -8192, 32768.0])[:, None]).to(dtype)
    gradient = logits.clone()
    nll = run(gradient, labels, 128, True)
    expected, slope = exact(logits, labels, 128)
    rounding = logits.double().abs().amax(1, keepdim=True) * 2**-22
    assert ((nll - expected).abs() <= 1e-6 + rounding[:, 0]).all()
    assert ((gradient - slope).abs() <= 1e-6 + rounding + slope.abs() * torch.finfo(dtype).eps / 2).all()


def test_the_label_of_least_probability(dtype_and_run):
    dtype, run = dtype_and_run
    logits = torch.zeros(2, 64, dtype=dtype)
    logits[:, 3] = torch.tensor([60.0, 300.0])
    nll = run(logits, torch.tensor([5, 5]), 64, True)
    torch.testing.assert_close(nll, torch.tensor([60.0, 300.0]))
    torch.testing.assert_close(logits[:, [3, 5]].float(), torch.tensor([[1.0, -1.0], [1.0, -1.0]]))


@pytest.mark.parametrize(
    "message, change",
    [
        ("logits has shape", {"logits": torch.zeros(8)}),
        ("logits has shape", {"logits": torch.zeros(16, 4).t()}),
        ("logits requires a gradient", {"logits": torch.zeros(4, 16, requires_grad=True)}),
        ("labels is torch.int32", {"labels": torch.zeros(4, dtype=torch.int32)}),
        ("labels is torch.int64 of shape", {"labels": torch.zeros(5, dtype=torch.int64)}),
        ("words=17", {"words": 17}),
        ("words=0", {"words": 0}),
        ("backend='tilelang'", {"backend": "tilelang"}),
    ],
)
def test_bad_input(message, change):
    call = {"logits": torch.zeros(4, 16), "labels": torch.zeros(4, dtype=torch.int64), "words": 16} | change
    with pytest.raises(ValueError, match=message):
        cross_entropy_(**call, with_gradient=True)


@needs_nvcc
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_resources(dtype):
    key = ("cross_entropy", dtype)
    found = resources(key)
    assert found.spilled == 0 and 0 < found.registers * THREADS * BLOCKS <= 2**16
    source = kernel(key).get_kernel_source()
    assert source.count(" = *(uint4*)(logits +") == 2 and source.count("  *(uint4*)(logits +") == 1


def test_operator_is_sound(monkeypatch):
    launches = []

    def launch(logits, labels, nll, *sizes):
        launches.append(sizes)
        nll.fill_(1)
        if sizes[-1]:
            logits.fill_(1)

    monkeypatch.setattr(operator, "_launcher", lambda dtype: launch)
    logits, labels = draw(6, 32, 29, dtype=torch.bfloat16)
    for with_gradient in (False, True):
        torch.library.opcheck(operator.cross_entropy, (logits.zero_(), labels, 29, with_gradient))
    assert set(launches) == {(4, 29, 0), (4, 29, 1)}
    assert operator.cross_entropy(logits[:0], labels[:0], 29, True).shape == (0,)
    with pytest.raises(ValueError, match="16"):
        operator.cross_entropy(torch.zeros(65, dtype=torch.bfloat16)[1:].view(2, 32), labels[:2], 29, True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(1, 8, 5), (7, 1000, 997), (300, 32000, 32000), (64, 151936, 151936)], ids=str)
def test_on_a_gpu(shape, dtype):
    logits, labels = (x.cuda() for x in draw(*shape, dtype=dtype))
    gradient, again = logits.clone(), logits.clone()
    alone = cross_entropy_(gradient, labels, shape[2], False, backend="tilelang")
    assert torch.equal(gradient.nan_to_num(), logits.nan_to_num())
    nll = cross_entropy_(gradient, labels, shape[2], True, backend="tilelang")
    assert torch.equal(nll, alone)
    assert torch.equal(cross_entropy_(again, labels, shape[2], True, backend="tilelang"), nll)
    assert torch.equal(again, gradient)
    assert_close(nll, gradient, logits, labels, shape[2])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["tilelang", "torch"])
def test_what_is_no_number_on_a_gpu(backend):
    logits, labels = (x.cuda() for x in draw(8, 1000, 997, dtype=torch.bfloat16))
    labels[:] = torch.tensor([996, 997, -1, IGNORED, 5, 5, 5, 5])
    for row, value in ((3, torch.nan), (4, torch.nan), (5, torch.inf), (6, -torch.inf)):
        logits[row, 500] = value
    gradient = logits.clone()
    nll = cross_entropy_(gradient, labels, 997, True, backend=backend)
    wrong = [False, True, True, False, True, True, False, False]
    assert nll.isnan().tolist() == wrong
    assert gradient[:, :997].isnan().any(1).tolist() == wrong == gradient[:, :997].isnan().all(1).tolist()
    assert nll[3] == 0 and not gradient[3].any() and gradient[6, 500] == 0 and not gradient[:, 997:].any()


@pytest.mark.gpu
def test_more_than_2_31_elements_on_a_gpu():
    logits = torch.zeros(67200, 32000, dtype=torch.bfloat16, device="cuda")
    labels = torch.arange(len(logits), device="cuda") % 32000
    nll = cross_entropy_(logits, labels, 32000, True, backend="tilelang")
    torch.testing.assert_close(nll, torch.full_like(nll, math.log(32000)))
    assert (logits[torch.arange(len(logits)), labels] == -1).all()
    assert logits[-1].float().sum().abs() < 1e-2
