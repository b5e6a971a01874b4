"""Checks boundaries of packed documents where they are, on the device: the host must not wait to look at them.

A kernel of its own, as a call that may print keeps the compiler from overlapping the tensor cores with anything.
"""

import tilelang.language as T


def boundaries_kernel():
    documents = T.dynamic("documents")

    @T.prim_func
    def boundaries(cu_seqlens: T.Tensor((documents + 1,), "int32"), tokens: T.int32):
        with T.Kernel(T.ceildiv(documents, 128), threads=128) as block:
            document = block * 128 + T.get_thread_binding()
            if document < documents:
                T.device_assert(
                    cu_seqlens[document + 1] >= cu_seqlens[document], "cu_seqlens descends", no_stack_info=True
                )
            if document == 0:
                T.device_assert(cu_seqlens[0] == 0, "cu_seqlens does not start at 0", no_stack_info=True)
                T.device_assert(
                    cu_seqlens[documents] == tokens,
                    "cu_seqlens does not end at the number of tokens",
                    no_stack_info=True,
                )

    return boundaries
