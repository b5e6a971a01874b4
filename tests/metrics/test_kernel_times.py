"""Families by name and by place of launch, the sharing out of time, and a step of a small model on the CPU."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from training_helpers import assert_identical, batch, one_process, optimizers_of, row, snapshot, tiny_model

from qlakernels.ranges import named_range
from qlatrain.metrics import kernel_times as module
from qlatrain.metrics.kernel_times import FAMILIES, Event, StepProfiler, family_by_name, kernel_times
from qlatrain.training.step import TrainStep

HOPPER = Path(__file__).parents[2] / "kernels/qlakernels/gated_delta_rule/hopper"

NAMES = {
    "gdn": [
        "forward_kernel",
        "gate_gradients_kernel",
        "reverse_kernel_1",
        "qlakernels::gated_delta_rule_backward",
        "ChunkGatedDeltaRuleFunction",
        "chunk_gated_delta_rule_fwd_kernel_h_blockdim64",
        "chunk_bwd_kernel_dqkwg",
        "merge_16x16_to_64x64_inverse_kernel",
        "chunk_scaled_dot_kkt_fwd_kernel",
        "chunk_local_cumsum_scalar_kernel",
        "tilelang_fused_chunk_gdr_bwd_kernel_kernel",
        "tilelang_kkt_solve_kernel_kernel",
    ],
    "attention": [
        "void pytorch_flash::flash_bwd_dot_do_o_kernel<true, pytorch_flash::Flash_bwd_kernel_traits<64>>",
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90>>>",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>)",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
        "torch_attn::_varlen_attn",
        "triton_tem_fused_flex_attention_0",
    ],
    "matrix_products": [
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize2x1x1_execute_segment_k_off_kernel",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x256_32x3_nn_align8>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>",
        "void gemv2T_kernel_val<int, int, float, float, float, float, 128, 16, 4, 4>",
        "triton_tem_fused_mm_3",
        "aten::addmm",
        "aten::bmm",
        "aten::linear",
        "aten::_scaled_mm",
    ],
    "optimizer": [
        "adamw_update_kernel",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::TensorListMetadata<2>>",
        "aten::_foreach_lerp",
        "aten::_fused_adamw_",
        "Optimizer.step#Muon.step",
        "optimizer",
    ],
    "communication": ["ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096>)", "c10d::allreduce_"],
    "norms_and_elementwise": [
        "triton_red_fused__fused_rms_norm_mm_flash_attention_7",
        "triton_poi_fused_cumsum_0",
        "short_conv_forward_kernel",
        "gated_norm_backward_kernel",
        "swiglu_forward_kernel",
    ],
    None: [
        "qlakernels::gated_delta_net_backward",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul>>",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float, true>",
        "Memcpy HtoD (Pinned -> Device)",
        "aten::mul",
        "aten::rms_norm",
        "aten::cumsum",
        "aten::mvlgamma",
        "Optimizer.zero_grad#AdamW.zero_grad",
        "autograd::engine::evaluate_function: MmBackward0",
        "void cub::DeviceScan::forward_kernel_like",
    ],
}


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, names in NAMES.items() for name in names])
def test_names(family, name):
    assert family_by_name(name) == family


def test_names_of_our_kernels():
    """TileLang adds `_kernel` to what stands under `T.prim_func`."""
    texts = [file.read_text() for file in HOPPER.glob("*.py")]
    names = [name for text in texts for name in re.findall(r"@T\.prim_func\s+def (\w+)", text)]
    assert len(names) >= 6
    assert {family_by_name(f"{name}_kernel") for name in names} == {"gdn"}


def kernel(name: str, start: int, end: int, stream: int = 7, launched_by: int = 0) -> Event:
    return Event(name, start, end, stream, on_device=True, launched_by=launched_by)


def in_ms(events: list[Event], on_gpu: bool = True) -> dict[str, float]:
    """Of the families that have any. A time of 1,000,000 in an event is one millisecond."""
    times = kernel_times(events, on_gpu)
    assert times.step_milliseconds == pytest.approx((max(e.end for e in events) - min(e.start for e in events)) / 1e6)
    assert sum(times.shares.values()) == pytest.approx(1)
    assert times.milliseconds.keys() == times.shares.keys() == FAMILIES.keys()
    return {family: ms for family, ms in times.milliseconds.items() if ms}


MS = 1_000_000


def test_every_instant_counts_once():
    gap = [kernel("sgemm", 0, 3 * MS), kernel("forward_kernel", 5 * MS, 6 * MS)]
    assert in_ms(gap) == {"matrix_products": 3, "idle": 2, "gdn": 1}
    # on two streams: together from 2 to 3
    both = [kernel("sgemm", 0, 3 * MS), kernel("forward_kernel", 2 * MS, 6 * MS, stream=8)]
    assert in_ms(both) == {"matrix_products": 2.5, "gdn": 3.5}
    three = [kernel("sgemm", 0, 3 * MS, stream) for stream in (1, 2)] + [kernel("flash_fwd_kernel", 0, 3 * MS, 3)]
    assert in_ms(three) == {"matrix_products": 2, "attention": 1}
    # of one stream, as when a kernel begins before the last blocks of the one in front have ended
    chained = [kernel("sgemm", 0, 3 * MS), kernel("forward_kernel", 2 * MS, 6 * MS)]
    assert in_ms(chained) == {"matrix_products": 2, "gdn": 4}


def test_communication_has_what_computation_does_not_hide():
    nccl = kernel("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 2 * MS, 9 * MS, stream=20)
    assert in_ms([kernel("sgemm", 0, 5 * MS), nccl]) == {"matrix_products": 5, "communication": 4}
    assert in_ms([kernel("sgemm", 0, MS), nccl]) == {"matrix_products": 1, "idle": 1, "communication": 7}


def test_nothing_ran():
    assert kernel_times([], on_gpu=True) is None
    assert kernel_times([Event("aten::mul", 0, MS, 1, id=1)], on_gpu=True) is None
    assert kernel_times([kernel("sgemm", 5, 5)], on_gpu=True) is None


def host(name: str, start: int, end: int, id: int, thread: int = 1, **more) -> Event:
    return Event(name, start, end, thread, id=id, **more)


def test_kernels_belong_where_they_were_launched():
    """Forward in thread 1; the backward in thread 2, the device's, by the sequence number of what made the node."""
    events = [
        host("aten::eq", 0, 5, 1, sequence=40),  # makes no node, so the counter stands at 40 still
        host("gated_delta_rule", 10, 50, 2, is_range=True),
        host("aten::bmm", 12, 18, 3, sequence=40),
        host("aten::mul", 20, 28, 4, sequence=41),
        host("aten::mul", 60, 68, 5, sequence=42),
        host("aten::scaled_dot_product_attention", 70, 90, 6, sequence=43),
        host("aten::bmm", 72, 78, 7),
        host("autograd::engine::evaluate_function: MulBackward0", 100, 119, 8, 2, sequence=42, forward_thread=1),
        host("aten::mul", 102, 108, 9, 2),
        host("autograd::engine::evaluate_function: MulBackward0", 120, 139, 10, 2, sequence=41, forward_thread=1),
        host("MulBackward0", 121, 138, 11, 2, sequence=41, forward_thread=1),
        host("aten::mul", 122, 128, 12, 2),
        host("autograd::engine::evaluate_function: BmmBackward0", 140, 159, 13, 2, sequence=40, forward_thread=1),
        host("aten::bmm", 142, 148, 14, 2),
        host("optimizer", 200, 300, 15, is_range=True),
        host("aten::bmm", 210, 220, 16),
        host("aten::mul", 230, 240, 17),
        host("aten::mm", 310, 320, 18),
        host("aten::mul", 330, 340, 19),
    ]
    expected = {
        1: "norms_and_elementwise",
        3: "gdn",
        4: "gdn",
        5: "norms_and_elementwise",
        7: "attention",
        9: "norms_and_elementwise",
        12: "gdn",
        14: "gdn",
        16: "optimizer",
        17: "optimizer",
        18: "matrix_products",
        19: "norms_and_elementwise",
    }
    for id, family in expected.items():
        unknown = kernel("a_kernel_nobody_knows", 0, MS, launched_by=id)
        assert kernel_times([*events, unknown], on_gpu=True).milliseconds[family] == 1, (id, family)
    # a matrix product by its name, unless somebody owns it; a collective always
    for name, id, family in (
        ("sgemm", 5, "matrix_products"),
        ("sgemm", 16, "optimizer"),
        ("ncclDevKernel_AllGather", 16, "communication"),
        ("sgemm", 99, "matrix_products"),  # launched in what the trace does not hold
    ):
        assert kernel_times([*events, kernel(name, 0, MS, launched_by=id)], on_gpu=True).milliseconds[family] == 1


def test_recomputed_operators_belong_where_they_did():
    """Checkpointing: operators run again inside a backward node, in its thread, and make nodes of their own."""
    events = [
        host("aten::mm", 0, 5, 1, sequence=3),
        host("autograd::engine::evaluate_function: MmBackward0", 10, 100, 2, 2, sequence=3, forward_thread=1),
        host("gated_delta_rule", 20, 50, 3, 2, is_range=True),
        host("aten::mul", 22, 28, 4, 2, sequence=0),
        host("autograd::engine::evaluate_function: MulBackward0", 110, 120, 5, 2, sequence=0, forward_thread=2),
        host("aten::mul", 112, 118, 6, 2),
    ]
    for id, family in ((4, "gdn"), (6, "gdn"), (1, "matrix_products"), (2, "norms_and_elementwise")):
        assert kernel_times([*events, kernel("k", 0, MS, launched_by=id)], on_gpu=True).milliseconds[family] == 1, id


def test_operators_of_a_cpu_count_without_those_they_call():
    events = [
        host("aten::linear", 0, 10 * MS, 1),
        host("aten::mm", 1 * MS, 8 * MS, 2),
        host("aten::empty", 2 * MS, 3 * MS, 3),
        host("optimizer", 12 * MS, 20 * MS, 4, is_range=True),
        host("aten::mul", 13 * MS, 18 * MS, 5),
    ]
    assert in_ms(events, on_gpu=False) == {
        "matrix_products": 9,
        "norms_and_elementwise": 1,
        "optimizer": 5,
        "idle": 5,
    }


class KinetoEvent:
    """What a trace gives, as functions."""

    def __init__(self, name: str, device: DeviceType, id: int = 0, link: int = 0, is_range: bool = False):
        values = {"name": name, "device_type": device, "correlation_id": id, "linked_correlation_id": link}
        values |= {"is_user_annotation": is_range, "start_ns": 5, "end_ns": 9, "device_resource_id": 7}
        values |= {"start_thread_id": 1, "end_thread_id": 1, "sequence_nr": -1, "fwd_thread_id": 0}
        for key, value in values.items():
            setattr(self, key, lambda value=value: value)


def test_what_of_a_trace_counts():
    cpu, gpu = DeviceType.CPU, DeviceType.CUDA
    trace = [
        KinetoEvent("aten::mm", cpu, 3),
        KinetoEvent("optimizer", cpu, 4, is_range=True),
        KinetoEvent("cudaLaunchKernel", cpu, 3, link=3),  # numbered by itself
        KinetoEvent("cuLaunchKernelEx", cpu, 4),
        KinetoEvent("cudaDeviceSynchronize", cpu, 5),
        KinetoEvent("nvjet_tst_128x64", gpu, 3, link=3),
        KinetoEvent("Memcpy DtoD (Device -> Device)", gpu, 9, link=3),
        KinetoEvent("optimizer", gpu, is_range=True),
        KinetoEvent("Context Sync", gpu, 5),
        KinetoEvent("Stream Wait Event", gpu, 6),
    ]
    results = SimpleNamespace(events=lambda: trace)
    events = module._events(SimpleNamespace(profiler=SimpleNamespace(kineto_results=results)))
    assert [(e.name, e.lane, e.on_device, e.is_range, e.id, e.launched_by) for e in events] == [
        ("aten::mm", 1, False, False, 3, 0),
        ("optimizer", 1, False, True, 4, 0),
        ("nvjet_tst_128x64", 7, True, False, 3, 3),
        ("Memcpy DtoD (Device -> Device)", 7, True, False, 9, 3),
    ]


def test_row():
    row = kernel_times([kernel("sgemm", 0, 3 * MS), kernel("forward_kernel", 3 * MS, 4 * MS)], on_gpu=True).row()
    keys = {f"kernel_times/{family}" for family in FAMILIES}
    assert row.keys() == keys | {f"{key}_ms" for key in keys} | {"kernel_times/step_ms"}
    assert (row["kernel_times/gdn"], row["kernel_times/gdn_ms"], row["kernel_times/step_ms"]) == (0.25, 1, 4)


def test_which_steps():
    device = torch.device("cpu")
    assert not any(StepProfiler(0, device, True).due(step) for step in range(1, 10))
    assert [step for step in range(1, 10) if StepProfiler(4, device, False).due(step)] == [4, 8]


class Training:
    def __init__(self, **sizes):
        self.model = tiny_model(**sizes)
        self.optimizers, layout = optimizers_of(self.model), one_process()
        self.step = TrainStep(layout.prepare(self.model), self.optimizers, layout, 1.0, lambda lengths: 0.0)
        self.arguments = ([batch(row(24)), batch(row(7, 9, 8))], 1.0, False)


@pytest.fixture
def families(monkeypatch):
    """Profiles a step of `training`; gives (its times, name of an operator → families of the calls of it)."""
    read = module._events

    def profiled(training: Training):
        seen: list[Event] = []
        monkeypatch.setattr(module, "_events", lambda recorded: seen.extend(read(recorded)) or seen)
        _, times = StepProfiler(1, torch.device("cpu"), True).run(training.step, *training.arguments)
        owners = module._owners(seen)
        return times, lambda name: {module._family_of_operator(event, owners) for event in seen if event.name == name}

    return profiled


def test_a_step_of_a_model(families):
    """The operators of the gated delta rule's torch backend, forward and backward, by what only they use here."""
    times, of = families(Training())
    assert sum(times.shares.values()) == pytest.approx(1)
    assert times.shares["communication"] == 0
    assert all(share > 0.005 for family, share in times.shares.items() if family != "communication"), times.shares
    assert of("aten::linalg_solve_triangular") == of("_Decay") == of("_DecayBackward") == {"gdn"}
    assert of("aten::bmm") == {"gdn", "optimizer"}
    assert of("BmmBackward0") == {"gdn"}
    assert of("aten::mm") == {"gdn", "matrix_products"}  # one in the backward of _Decay
    assert of("MmBackward0") == {"norms_and_elementwise"}  # of which the product is a call
    assert of("aten::_scaled_dot_product_flash_attention_for_cpu_backward") == {"attention"}
    assert of("aten::_fused_adamw_") == of("aten::_foreach_norm") == {"optimizer"}
    assert of("aten::silu") == of("aten::silu_backward") == {"norms_and_elementwise"}


def test_checkpointing_moves_nothing_between_families(families):
    training = Training()
    training.model.model.activation_checkpointing = True
    _, of = families(training)
    assert of("BmmBackward0") == of("_DecayBackward") == {"gdn"}
    assert of("aten::silu_backward") == {"norms_and_elementwise"}


def test_other_processes_take_the_step_only():
    training = Training()
    result, times = StepProfiler(1, torch.device("cpu"), False).run(training.step, *training.arguments)
    assert times is None and result.read().loss > 0


def test_the_same_step_with_and_without():
    plain, profiled = Training(), Training()
    profiler = StepProfiler(1, torch.device("cpu"), True)
    for _ in range(3):
        expected = plain.step(*plain.arguments).read()
        assert profiler.run(profiled.step, *profiled.arguments)[0].read() == expected
    assert_identical(snapshot(profiled.model, profiled.optimizers), snapshot(plain.model, plain.optimizers))


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch):
    """Twice: CUPTI is detached after the first. The backward runs in a thread of its own."""
    read, seen = module._events, []
    monkeypatch.setattr(module, "_events", lambda recorded: seen.extend(read(recorded)) or seen)
    weight = torch.randn(1024, 1024, device="cuda", requires_grad=True)
    optimizer = torch.optim.AdamW([weight], fused=True)

    def step() -> None:
        with named_range("gated_delta_rule"):
            x = (weight @ weight).sin()
        (x @ weight).tanh().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    profiler = StepProfiler(2, torch.device("cuda"), True)
    for _ in range(2):
        for _ in range(5):
            step()
        seen.clear()
        _, times = profiler.run(step)
        idle = {"attention", "communication"}
        assert all((share > 0) == (family not in idle) for family, share in times.shares.items()), times.shares
        assert sum(times.shares.values()) == pytest.approx(1)
        operators = {event.id: event for event in seen if not event.on_device}
        owners = module._owners(list(operators.values()))
        kernels = [event for event in seen if event.on_device and event.launched_by in operators]
        families = {
            name: {
                module._family_of_kernel(event.name, operators[event.launched_by], owners)
                for event in kernels
                if operators[event.launched_by].name == name
            }
            for name in ("aten::sin", "aten::cos", "aten::mm", "aten::tanh", "aten::tanh_backward")
        }
        assert families["aten::sin"] == families["aten::cos"] == {"gdn"}
        assert families["aten::mm"] == {"gdn", "matrix_products"}
        assert families["aten::tanh"] == families["aten::tanh_backward"] == {"norms_and_elementwise"}
