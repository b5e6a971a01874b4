"""Boundaries of packed documents, looked at where they are: the host must not wait to see them.

Checks that they start at 0, never descend and end at the number of tokens, and orders the documents for the scans: the
longest first, equal ones by index, so that the chip does not wait at the end for a long one that began late. The place
of a document is the number of those before it, counted one by one: beyond `MOST` documents, of which none can be long,
they stay as they are.

A kernel of its own, as a call that may print keeps the compiler from overlapping the tensor cores with anything. What
does not hold is told by the expression of an assertion: the driver prints that with the error, whoever meets it first,
where what a kernel prints is lost unless the next to meet the error is a wait.
"""

import tilelang.language as T

MOST = 4096
THREADS = 128
REQUIREMENTS = """
__device__ __forceinline__ void require_start(bool holds) { assert(holds && "cu_seqlens starts at 0"); }
__device__ __forceinline__ void require_order(bool holds) { assert(holds && "cu_seqlens does not descend"); }
__device__ __forceinline__ void require_end(bool holds) {
  assert(holds && "cu_seqlens ends at the number of tokens");
}
"""


def boundaries_kernel():
    documents = T.dynamic("documents")

    @T.prim_func
    def boundaries(
        cu_seqlens: T.Tensor((documents + 1,), "int32"),
        order: T.Tensor((documents,), "int32"),
        tokens: T.int32,
    ):
        with T.Kernel(T.ceildiv(documents, THREADS), threads=THREADS, prelude=REQUIREMENTS) as block:
            length = T.alloc_fragment((THREADS,), "int32")
            place = T.alloc_fragment((THREADS,), "int32")
            first = block * THREADS
            document = first + T.get_thread_binding()
            if document < documents:
                T.call_extern("handle", "require_order", cu_seqlens[document + 1] >= cu_seqlens[document])
            if document == 0:
                T.call_extern("handle", "require_start", cu_seqlens[0] == 0)
                T.call_extern("handle", "require_end", cu_seqlens[documents] == tokens)
            for i in T.Parallel(THREADS):
                place[i] = T.if_then_else(documents > MOST, first + i, 0)
            if documents <= MOST:
                for i in T.Parallel(THREADS):
                    length[i] = T.if_then_else(
                        first + i < documents, cu_seqlens[first + i + 1] - cu_seqlens[first + i], 0
                    )
                for other in T.serial(documents):
                    for i in T.Parallel(THREADS):
                        place[i] += T.cast(
                            cu_seqlens[other + 1] - cu_seqlens[other] + T.cast(other < first + i, "int32") > length[i],
                            "int32",
                        )
            for i in T.Parallel(THREADS):
                if first + i < documents:
                    order[place[i]] = first + i

    return boundaries
