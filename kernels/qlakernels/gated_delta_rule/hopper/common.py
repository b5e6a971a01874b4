"""What the Hopper kernels share: the chunk, the index map from slots to documents, and the layouts of fragments.

A document n of tokens cu[n] to cu[n + 1] owns the slots base(n) = ⌊cu[n] / C⌋ + n and onwards, one for each of its
chunks of C tokens. Slots of different documents never meet, whatever their lengths, so a grid of ⌊tokens / C⌋ + N
slots reaches every chunk without a prefix sum over the documents, and nothing on the host depends on `cu_seqlens`.

A tile that ordinary loads read (ldmatrix among them) is given back to the copy engine behind `fence_proxy_async`: an
arrival at a barrier does not wait for loads that are on their way, and behind a queue of stores they can be late by
microseconds. The tensor cores' own reads have been waited for with their products.
"""

import tilelang
import tilelang.language as T
from tilelang.cuda.intrinsics.macro.wgmma_macro_generator import (
    TensorCoreIntrinEmitter as WgmmaEmitter,
)
from tilelang.layout import Fragment, make_full_bank_swizzled_layout, make_half_bank_swizzled_layout
from tvm import DataType

from qlakernels.gated_delta_rule.hopper.sizes import CHUNK, PIECE

if tilelang.__version__.startswith("0.1.15"):
    # It fences the accumulators of all warpgroups in each of them, which reads past the end of a thread's registers
    # and spills them: with one accumulator over two warpgroups, 1,188 bytes in the forward.
    WgmmaEmitter.wgmma_accum_regs = property(
        lambda self: (
            self.wgmma_num_inst_m * self.warp_cols * self.local_size_out * DataType(self.accum_dtype).bits // 32
        )
    )

BETA_MIN = {"bfloat16": 2.0**-16, "float16": 2.0**-8}  # what W and dv are divided by must be a number of their dtype
OMEGA_MIN = 2.0**-100
LOG2E = 1.4426950408889634
L2_EPS = 1e-6


PRELUDE = """
#include <cuda_bf16.h>
__device__ __forceinline__ void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void fence_global() { asm volatile("fence.proxy.async;" ::: "memory"); }
__device__ __forceinline__ void sync_warpgroup(int barrier) {
  asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void hold_memory() { asm volatile("" ::: "memory"); }
__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}
__device__ __forceinline__ void copy_or_clear(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               ::"r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ __forceinline__ void load_matrices(void* block, unsigned address) {
  unsigned* x = static_cast<unsigned*>(block);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ float2 widened(__nv_bfloat162 x) {
  unsigned bits = reinterpret_cast<unsigned&>(x);
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}
#define __bfloat1622float2 widened  // which takes an instruction more for a pair
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
"""


def exp2(x):
    """2^x in one instruction, to 2 ulp; results below 2⁻¹²⁶ are 0. Needs PRELUDE."""
    return T.call_extern("float32", "fast_exp2", x)


def log2(x):
    """The logarithm in one instruction, to 2⁻²²; −∞ of 0 and of what is below 2⁻¹²⁶. Needs PRELUDE."""
    return T.call_extern("float32", "fast_log2", x)


def folds_decay(dtype: str) -> bool:
    """Whether W carries the decay to the end of its chunk: bfloat16 has the range for it."""
    return dtype == "bfloat16"


def weight_of_W(beta, rho, kappa, dtype):
    """ω of W = round(ω ∘ E): κβρ, so that W enters the state as it is, or β where the decay does not fit; never 0."""
    if folds_decay(dtype):
        return kappa * T.max(beta * rho, OMEGA_MIN)
    return T.max(beta, BETA_MIN[dtype])


@T.macro
def find_document(cu_seqlens, documents, slot, steps, stride, place):
    """place[0] ← the largest n with ⌊cu[n] / stride⌋ + n ≤ slot, in `steps` halvings; place is a local int32 [3]."""
    place[0] = 0
    place[1] = documents
    for _ in T.serial(steps):
        if place[1] - place[0] > 1:
            place[2] = (place[0] + place[1]) // 2
            if cu_seqlens[place[2]] // stride + place[2] <= slot:
                place[0] = place[2]
            else:
                place[1] = place[2]


FIRST, LEFT, BASE = 3, 4, 5  # what `locate` leaves in `place`


@T.macro
def locate(cu_seqlens, documents, slot, steps, stride, place):
    """Where a slot of `stride` tokens, a multiple of CHUNK, lies: place[0] ← its document, place[FIRST] ← its first
    token, place[LEFT] ← the tokens from there to the end of the document (none or fewer where the slot is idle),
    place[BASE] ← the slot of its first chunk. place is a local int32 [6]."""
    find_document(cu_seqlens, documents, slot, steps, stride, place)
    place[2] = cu_seqlens[place[0]]
    place[1] = slot - place[2] // stride - place[0]
    place[FIRST] = place[2] + place[1] * stride
    place[LEFT] = cu_seqlens[place[0] + 1] - place[FIRST]
    place[BASE] = place[2] // CHUNK + place[0] + place[1] * (stride // CHUNK)


LENGTH, OPENS, CLOSES = 1, 2, 6  # what `take_segment` leaves in `place` besides


@T.macro
def take_segment(cu_seqlens, documents, turn, segment, steps, place):
    """A slot of `segment` tokens: as `locate`, and place[LENGTH] ← its tokens, perhaps none, place[OPENS] and
    place[CLOSES] ← whether its document begins and ends with it. place is a local int32 [7]."""
    locate(cu_seqlens, documents, turn, steps, segment, place)
    place[LENGTH] = T.max(0, T.min(segment, place[LEFT]))
    place[OPENS] = T.cast(place[FIRST] == cu_seqlens[place[0]], "int32")
    place[CLOSES] = T.cast(place[LEFT] <= segment and place[LENGTH] + place[OPENS] > 0, "int32")


def section_of(cu_seqlens, document, token, section):
    """The slot, of `section` tokens, that a token of the document lies in, which may be its last but one."""
    first = cu_seqlens[document]
    return first // section + document + (token - first) // section


@T.macro
def take_turn(cu_seqlens, order, documents, turn, in_segments, segment, steps, place):
    """What a scan's block takes: a document, the longest first, or `in_segments` one slot, as `take_segment`."""
    if in_segments:
        take_segment(cu_seqlens, documents, turn, segment, steps, place)
    else:
        place[0] = order[turn]
        place[FIRST] = cu_seqlens[place[0]]
        place[LENGTH] = cu_seqlens[place[0] + 1] - place[FIRST]
        place[BASE] = place[FIRST] // CHUNK + place[0]
        place[OPENS] = 1
        place[CLOSES] = 1


@T.macro
def release_tiles():
    """Before an arrival that lets the copy engine or the tensor cores at shared memory this thread has read or written
    by ordinary loads or stores. Unlike `T.fence_proxy_async` it also holds the compiler; needs PRELUDE."""
    T.call_extern("handle", "fence_shared")


@T.macro
def acquire_stores():
    """Before the copy engine reads in global memory what threads of this block have stored there and signalled. Waits
    until the stores have reached the L2 cache; needs PRELUDE."""
    T.call_extern("handle", "fence_global")


@T.macro
def arrive(barriers, index):
    """An arrival that the compiler moves no load or store across, as it may with `T.barrier_arrive`; needs PRELUDE."""
    T.call_extern("handle", "hold_memory")
    T.barrier_arrive(barriers[index])


@T.macro
def wait(barriers, index, parity):
    """A wait that the compiler moves no load or store across; needs PRELUDE."""
    T.barrier_wait(barriers[index], parity)
    T.call_extern("handle", "hold_memory")


@T.macro
def sync_warpgroup(barrier):
    """`T.sync_threads` of 128 threads at a named barrier that need not be known to the compiler; needs PRELUDE."""
    T.call_extern("handle", "sync_warpgroup", barrier)


@T.macro
def load_tail(tile, stage, source, first, head, column, left, width, below=0):
    """Rows of tile[stage] from `below` on ← those from `first` on of source[:, head, column:column + width], of which
    `left` exist; else 0.

    By a warp, in pieces of 16 bytes that all are on their way at once; needs PRELUDE. stage None: of a tile [C, width].
    Rows behind the end of a document belong to the next one: a product with them must not happen, as 0 · NaN is NaN.
    Both indexes are clamped, since where one is out of bounds the copy would be left out, not cleared. The loop is not
    unrolled: its addresses, 64 bits wide, would be kept through the loop over the chunks, and spill.
    """
    pieces = width // PIECE
    for i in T.unroll(CHUNK * pieces // 32, unroll_factor=1):
        piece = i * 32 + T.get_thread_binding() % 32
        row = piece // pieces
        at = piece % pieces * PIECE
        there = row < left and column + at < source.shape[2]
        T.call_extern(
            "handle",
            "copy_or_clear",
            T.access_ptr(tile[below + row, at] if stage is None else tile[stage, below + row, at], "w", extent=PIECE),
            T.access_ptr(
                source[first + T.min(row, left - 1), head, T.min(column + at, source.shape[2] - PIECE)],
                "r",
                extent=PIECE,
            ),
            T.if_then_else(there, 16, 0),
        )
    T.call_extern("handle", "await_copies")
    release_tiles()


@T.macro
def bring(tile, stage, source, first, head, left, width, full):
    """tile[stage] ← rows `first` and onwards of source[:, head], of which `left` exist, else 0; full[stage] says when
    it is there. By a warp."""
    if left >= CHUNK:
        T.tma_copy(source[first : first + CHUNK, head, :], tile[stage, :, :], barrier=full[stage])
    else:
        load_tail(tile, stage, source, first, head, 0, left, width)
    arrive(full, stage)


def state_layout(tile):
    """Layout of a tile of the state in shared memory, [V, K], that the copy engine takes and rows do not meet in."""
    return make_full_bank_swizzled_layout(tile) if tile.shape[-1] % 64 == 0 else make_half_bank_swizzled_layout(tile)


def accumulator(rows: int, columns: int) -> Fragment:
    """Layout of a wgmma accumulator, 64 rows to each warpgroup."""

    def place(row, column):
        return row // 16 * 32 + row % 8 * 4 + column % 8 // 2, column // 8 * 4 + row % 16 // 8 * 2 + column % 2

    return Fragment((rows, columns), forward_fn=place)


def accumulator_rows(rows: int = CHUNK) -> Fragment:
    """Layout of a loop over what each row of a wgmma accumulator has been reduced to, which four threads hold.

    tilelang would find it, by trying it out anew with each of a warpgroup's loops: 4 s for the largest kernel.
    """
    return Fragment(
        (rows,), forward_fn=lambda row, copy: (row // 16 * 32 + row % 8 * 4 + copy, row % 16 // 8), replicate=4
    )


def transposed_accumulator(rows: int) -> Fragment:
    """Layout of a [CHUNK, rows] fragment whose elements lie where a wgmma accumulator [rows, CHUNK] has them.

    64 rows belong to each warpgroup. With it a copy to or from shared memory becomes stmatrix or ldmatrix, transposed.
    """

    def place(token, row):
        thread = row // 64 * 128 + row % 64 // 16 * 32 + row % 8 * 4 + token % 8 // 2
        return thread, token // 8 * 4 + row % 16 // 8 * 2 + token % 2

    return Fragment((CHUNK, rows), forward_fn=place)
