"""Where a step's time goes: kinds of kernels by name and operator, traces of a GPU, waits of the host, a CPU's own."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kernels
from scripts.step import breakdown
from scripts.step.bench import Variant
from tests.helpers.calls import Calls

NAMES = {  # names of kernels as traces of H100s have them, outside any operator that is known
    "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT": "GEMM",
    "nvjet_hsh_128x256_64x4_2x1_v_bz_TNN": "GEMM",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_kernel__5x_cublas": "GEMM",
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>(Params)": "GEMM",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>(...)": "GEMM",
    "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn": "GEMM",
    "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16>(...)": "GEMM",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64, 64, 4>>(Flash_fwd_params)": "attention",
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::Params)": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0": "attention",
    "_dq_kernel": "attention", "_dkdv_kernel": "attention", "_sum_kernel": "attention",
    "_rotate_kernel": "rope", "_rows_kernel": "cross entropy", "_scale_kernel": "cross entropy",
    "update_kernel": "optimizer", "_partial_kernel": "gradient norm", "_total_kernel": "gradient norm",
    "_forward_kernel": "other", "_backward_kernel": "other",  # several files have one: the operator tells
    "Memcpy DtoD (Device -> Device)": "copies and fills", "Memset (Device)": "copies and fills",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, ...>": "copies and fills",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<...>": "copies and fills",
    "void at::native::vectorized_gather_kernel<16, long>(char*, char*, long*, int, ...)": "other",
    "void at::native::(anonymous namespace)::embedding_backward_feature_kernel<...>(int const*, ...)": "embedding",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, ...>": "other",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_kinds_of_names(name):
    assert breakdown.kind_of(name, []) == NAMES[name]


def test_operators_tell_where_names_do_not():
    kind_of = breakdown.kind_of
    for operators, kind in (
        (["_NormLinear", "cria::rms_norm_forward"], "norms"), (["cria::swiglu_forward"], "swiglu"),
        (["cria::attention_forward"], "attention"), (["something"], "other"),
    ):  # fmt: skip
        assert kind_of("_forward_kernel", operators) == kind
    # A GEMM inside our operator is a GEMM, and the copy that addmm makes first is a copy.
    assert kind_of("nvjet_tst_1", ["cria::linear_cross_entropy_forward", "aten::mm"]) == "GEMM"
    assert kind_of("splitKreduce_kernel", ["cria::linear_cross_entropy_forward"]) == "GEMM"
    assert kind_of("elementwise_kernel", ["aten::addmm", "aten::copy_"]) == "copies and fills"
    assert kind_of("Memset (Device)", ["aten::mm"]) == "GEMM"
    assert kind_of("reduce_kernel", ["cria::grad_norm", "aten::new_zeros"]) == "gradient norm"
    assert kind_of("compute_grad_weight", ["aten::embedding_dense_backward"]) == "embedding"


def test_every_operator_of_ours_has_a_kind():
    assert kernels.__name__  # its import registers them
    names = {f"cria::{name.split('::')[1].split('.')[0]}" for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("cria::")}  # fmt: skip
    assert names and names <= set(breakdown.KIND_OF), names - set(breakdown.KIND_OF)


class Trace:
    """What torch.profiler exports of a GPU: host operators, calls of CUDA, kernels; times in us."""

    def __init__(self):
        self.events, self.n = [{"ph": "M", "name": "process_name"}], 0

    def add(self, cat, name, ts, dur, tid=1, **args):
        self.events.append({"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args})

    def launch(self, operators, name, at, ts, dur, *, stream=7, tid=1, cat="kernel", call=True):
        """A kernel at ts that these operators launched at `at`, through the driver as Triton does."""
        self.n += 1
        for depth, operator in enumerate(operators):
            ids = {"External id": 1000 * self.n + depth}
            self.add("cpu_op", operator, at - 3 + depth * 0.1, 6 - depth * 0.2, tid, **ids)
        external = {"External id": 1000 * self.n + len(operators) - 1}
        if call:
            self.add("cuda_driver", "cuLaunchKernelEx", at, 1, tid, correlation=self.n, **external)
        self.add(cat, name, ts, dur, 99, stream=stream, correlation=self.n, **external)


@pytest.fixture
def trace():
    t = Trace()
    for step in (0, 1, 2):
        began = 1000 * step
        t.add("user_annotation", f"training step {step + 5}", began, 900, 1)
        t.add("gpu_user_annotation", f"training step {step + 5}", began + 500, 900, 99, stream=7)
        t.launch(["_NormLinear", "cria::rms_norm_forward"], "_forward_kernel", began + 10, began + 500, 100)
        t.launch(["_NormLinear", "aten::linear", "aten::mm"], "nvjet_tst_1", began + 20, began + 600, 400)
        # backward runs in a thread of its own; without the call, the id of the operator says who launched it
        t.launch(["Backward", "cria::swiglu_backward_over"], "_backward_kernel", began + 30, began + 1050, 200, tid=2)
        t.launch(["cria::adamw_update"], "update_kernel", began + 40, began + 1250, 100, call=False)
        t.launch(["aten::copy_"], "Memcpy HtoD (Pinned -> Device)", began + 50, began + 510, 30, stream=13, tid=3,
                 cat="gpu_memcpy")  # fmt: skip
        t.add("cuda_runtime", "cudaEventSynchronize", began + 60, 5, 1, correlation=10**6 + step)
    return t


def test_a_step_of_a_trace(trace):
    found = breakdown.break_down_step(trace.events, 1, device=True)
    assert found["wall_ms"] == 1.0 and found["busy_ms"] == 0.8 and found["launches"] == 4
    ms = {kind: part["ms"] for kind, part in found["kinds"].items() if part["ms"]}
    assert ms == {"norms": 0.1, "GEMM": 0.4, "swiglu": 0.2, "optimizer": 0.1, "gaps": pytest.approx(0.2)}
    assert sum(part["share"] for part in found["kinds"].values()) == pytest.approx(1)
    assert set(found["kinds"]) == {*breakdown.KINDS, "other", "gaps"} and found["other_streams_ms"] == 0.03
    assert found["top"][0] == {"name": "nvjet_tst_1", "kind": "GEMM", "ms": 0.4, "share": 0.4, "times": 1}
    assert (found["syncs"], found["event_waits"], found["pageable_copies"]) == (0, 1, 0)
    assert found["host_calls"]["cuLaunchKernelEx"] == 4


def test_a_kernel_without_a_known_launch_counts_where_it_ran(trace):
    trace.add("kernel", "_rotate_kernel", 1400, 50, 99, stream=7)  # the second step's first kernel is at 1500
    trace.add("kernel", "_rotate_kernel", 2600, 50, 99, stream=7)
    assert breakdown.break_down_step(trace.events, 0, device=True)["kinds"]["rope"]["ms"] == 0.05
    assert breakdown.break_down_step(trace.events, 1, device=True)["kinds"]["rope"]["ms"] == 0
    for event in trace.events:
        event.get("args", {}).clear()
    with pytest.raises(RuntimeError, match="launched by the step"):
        breakdown.break_down_step(trace.events, 1, device=True)


def test_kernels_side_by_side_are_busy_once(trace):
    before = breakdown.break_down_step(trace.events, 1, device=True)
    trace.launch(["cria::scaled"], "_scale_kernel", 1045, 1650, 100)  # while the GEMM runs
    found = breakdown.break_down_step(trace.events, 1, device=True)
    assert found["busy_ms"] == before["busy_ms"] and found["kinds"]["cross entropy"]["ms"] == 0.1


def test_a_wait_of_the_host_is_found(trace):
    trace.add("cpu_op", "aten::item", 1100, 50, 1)
    trace.add("cuda_runtime", "cudaMemcpyAsync", 1110, 5, 1)
    trace.add("cuda_runtime", "cudaStreamSynchronize", 1120, 20, 1)
    trace.add("cuda_runtime", "cudaDeviceSynchronize", 3500, 20, 1)  # the profiler's own, after the step
    found = breakdown.break_down_step(trace.events, 1, device=True)
    assert found["syncs"] == 1 and found["syncs_where"] == {"cudaStreamSynchronize in aten::item": 1}
    for name, waits in (("cudaStreamSynchronize", 1), ("cuStreamSynchronize", 1), ("cudaDeviceSynchronize", 1),
                        ("cudaMemcpy", 1), ("cudaFree", 1), ("cudaMemcpyAsync", 0), ("cudaStreamWaitEvent", 0),
                        ("cudaEventSynchronize", 0), ("cudaMemsetAsync", 0)):  # fmt: skip
        assert bool(breakdown.WAITS.match(name)) == waits, name


def test_a_trace_without_kernels_is_no_trace_of_a_device():
    t = Trace()
    t.add("user_annotation", "training step 1", 0, 10)
    t.add("user_annotation", "training step 2", 10, 10)
    with pytest.raises(RuntimeError, match="saw no kernel"):
        breakdown.break_down_step(t.events, 0, device=True)


def test_on_a_cpu_operators_take_what_those_inside_them_do_not(monkeypatch):
    monkeypatch.setitem(breakdown.VARIANTS, "llama-7b", Variant(impl="ref"))
    found = breakdown.measure_breakdown("llama-7b", smoke=True)
    kinds = found["kinds"]
    assert sum(part["share"] for part in kinds.values()) == pytest.approx(1, abs=1e-6)
    assert kinds["GEMM"]["ms"] > 0 and kinds["gaps"]["ms"] > 0 and found["syncs"] == 0
    assert len(found["top"]) == 15 and found["launches"] > 100
    text = "\n".join(breakdown.format_part({"records": [{"name": "llama-7b", **found}, {"name": "x", "failed": "y"}]}))
    assert "0 times the host waited" in text and "of x goes: failed: y" in text


def test_what_takes_longest_is_told_first():
    kinds = {kind: {"ms": ms, "share": ms / 10} for kind, ms in (("norm", 1.0), ("GEMM", 6.0), ("gaps", 3.0))}
    record = {"name": "x", "wall_ms": 10.0, "launches": 3, "syncs": 0, "kinds": kinds, "top": [], "syncs_where": {}}
    lines = breakdown.format_part({"records": [record]})
    assert [line.split()[0] for line in lines[1:]] == ["GEMM", "gaps", "norm"]


@pytest.mark.parametrize("smoke", [False, True])
def test_what_is_broken_down_is_a_warm_step_at_the_size_that_fits(smoke, monkeypatch):
    made, ran, traced = [], [], []

    class Steps:
        def __init__(self, variant, tokens, n_steps, is_smoke):
            made.append((variant.tokens, tokens, n_steps, is_smoke))
            if tokens > 5000:
                raise torch.OutOfMemoryError("CUDA out of memory")

        def run(self, step):
            ran.append(step)

        def read_figures(self):
            pass

        def seconds(self):
            return [2.0, 4.0, 3.0, 5.0][: len(ran)]  # the first one not yet warm

        def close(self):
            pass

    monkeypatch.setattr(breakdown, "Steps", Steps)
    monkeypatch.setattr(breakdown, "trace_steps", lambda steps, first, last: traced.append((first, last)))
    monkeypatch.setattr(breakdown, "break_down_step", lambda events, number, device: {"watched": number})
    found = breakdown.measure_breakdown("llama-7b", smoke)
    size = breakdown.TOY_TOKENS if smoke else 8320 // 2
    assert made[-1] == (size, size, 1 if smoke else 7, smoke) and found["tokens"] == size
    assert ran == ([] if smoke else [1, 2, 3, 4]) and traced == [(1, 1) if smoke else (5, 7)]
    assert found["watched"] == (0 if smoke else 1)
    assert found["step_ms_without_profiler"] == (None if smoke else 3000.0)


def test_breakdowns_are_a_part_of_their_own(monkeypatch):
    asked = []
    monkeypatch.setattr(breakdown, "measure_in_processes", lambda report, *what: asked.append(what))
    monkeypatch.setattr(breakdown, "names_for_card", lambda names, smoke: list(names))
    for smoke in (False, True):
        breakdown.measure_part(SimpleNamespace(smoke=smoke))
    module = "scripts.step.breakdown"
    assert asked == [("profile", module, list(breakdown.PROFILED)), ("profile", module, [breakdown.MAIN])]


def event(name, cat, ts, dur, **args):
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, "tid": 1, "args": args}


def trace_of(*more):
    """Return a trace of two steps, 100 to 200 and 200 to 300 us, each with a kernel of 50 us on stream 7."""
    events = [event(f"{breakdown.STEP}{i}", "user_annotation", 100 * i, 100) for i in (1, 2)]
    for i in (1, 2):
        events += [event("cudaLaunchKernel", "cuda_runtime", 100 * i + 1, 1, correlation=i),
                   event("_kernel", "kernel", 100 * i + 10, 50, correlation=i, stream=7)]  # fmt: skip
    return [*events, *more]


def work(name, launched, correlation, stream, dur=5):
    return [event("cudaMemcpyAsync", "cuda_runtime", launched, 1, correlation=correlation),
            event(name, "gpu_memcpy", launched + 20, dur, correlation=correlation, stream=stream)]  # fmt: skip


def test_work_belongs_to_the_step_that_launched_it_and_to_no_other():
    """Not what was launched before the first step, though it ends within it."""
    found = breakdown.break_down_step(trace_of(*work("Memcpy DtoD", 50, 9, 7)), 0, device=True)
    assert found["launches"] == 1 and found["busy_ms"] == 0.05


def test_the_computing_stream_is_the_busiest_whichever_comes_first():
    copies = work("Memcpy HtoD (Pageable -> Device)", 102, 9, 20)
    events = trace_of()
    for trace in ([*copies, *events], [*events, *copies]):
        found = breakdown.break_down_step(trace, 0, device=True)
        assert found["busy_ms"] == 0.05 and found["other_streams_ms"] == 0.005 and found["wall_ms"] == 0.1
        assert found["pageable_copies"] == 1  # on whichever stream


@pytest.mark.parametrize("name", ["cudaEventSynchronize", "cuEventSynchronize"])
def test_a_wait_for_an_event_is_counted_apart(name):
    found = breakdown.break_down_step(trace_of(event(name, "cuda_runtime", 150, 5)), 0, device=True)
    assert found["event_waits"] == 1 and found["syncs"] == 0


def test_a_bare_copy_is_a_copy_whatever_operator_makes_it():
    assert breakdown.kind_of("Memcpy DtoD (Device -> Device)", ["aten::addmm"]) == "copies and fills"


def test_operators_that_follow_each_other_without_a_gap_are_not_within_each_other():
    first, second = event("a", "cpu_op", 0, 10), event("b", "cpu_op", 10, 5)
    inner = event("c", "cpu_op", 11, 2)
    found = {e["name"]: around for e, around in breakdown.nest_host_events([inner, second, first])}
    assert found == {"a": [], "b": [], "c": ["b"]}


def test_what_the_host_does_between_two_steps_is_of_the_first(monkeypatch):
    events = trace_of(event("cudaDeviceSynchronize", "cuda_runtime", 190, 5))
    events[0]["dur"] = 80  # the first step's range ends at 180
    assert breakdown.break_down_step(events, 0, device=True)["syncs"] == 1
    assert breakdown.break_down_step(events, 0, device=False)["syncs"] == 1


def told(record):
    """Return a record as its file and as its printed lines."""
    named = {"name": "llama-7b", **record}
    return json.dumps(record, indent=1) + "\n" + "\n".join(breakdown.format_part({"records": [named]}))


def test_the_whole_breakdown_of_a_step(trace, snapshot):
    """With waits in and out of operators, copies of pageable memory, and work that no kind knows."""
    trace.add("cpu_op", "aten::item", 1100, 50, 1)
    trace.add("cuda_runtime", "cudaStreamSynchronize", 1120, 20, 1)
    trace.add("cuda_runtime", "cudaStreamSynchronize", 1200, 20, 1)
    trace.add("cuda_driver", "cuCtxSynchronize", 1220, 20, 1)
    trace.launch(["aten::copy_"], "Memcpy DtoH (Device -> Pageable)", 1250, 1700, 9, stream=13, cat="gpu_memcpy")
    for at in (1300, 1310):
        trace.launch(["aten::sigmoid"], "sigmoid_kernel" + "x" * 200, at, at + 1100, 7)
    trace.launch(["cria::grad_norm"], "Memset (Device)", 1350, 2430, 3, cat="gpu_memset")
    trace.add("kernel", "_rotate_kernel", 2440, 5, 99, stream=7)  # nobody knows who launched it
    assert told(breakdown.break_down_step(trace.events, 1, device=True)) == snapshot


def test_the_whole_breakdown_of_a_step_of_a_cpu(snapshot):
    """Each operator's time is without that of its children; other threads, other steps and events of other phases are
    none of it."""
    steps = [event(f"{breakdown.STEP}{i}", "user_annotation", 100 * i, 90) for i in (1, 2, 3)]
    ops = [
        ("aten::linear", 205, 40), ("aten::mm", 210, 30), ("aten::copy_", 212, 8), ("aten::mm", 222, 6),
        ("aten::add", 250, 10), ("cria::rms_norm_forward", 262, 20), ("aten::mul", 264, 4), ("aten::late", 292, 5),
        ("aten::early", 150, 60), ("aten::next", 300, 5),
    ]  # fmt: skip
    events = [*steps, *(event(name, "cpu_op", ts, dur) for name, ts, dur in ops)]
    events += [event("elsewhere", "cpu_op", 230, 9) | {"tid": 2}, event("mark", "cpu_op", 231, 9) | {"ph": "i"}]
    assert told(breakdown.break_down_step(events[::-1], 1, device=False)) == snapshot
    last = breakdown.break_down_step(events, 2, device=False)
    assert last["wall_ms"] == 0.09 and last["busy_ms"] == 0.005  # until its own range's end


def test_a_step_is_traced_between_waits_for_the_device(monkeypatch):
    calls = Calls()
    monkeypatch.setattr(breakdown, "GPU", True)
    monkeypatch.setattr(torch.cuda, "synchronize", calls.stand_in("synchronize"))
    written = {"traceEvents": [{"name": "a \x01 b"}]}

    class Profile:
        def __enter__(self):
            calls.lines.append("begin")
            return self

        def __exit__(self, *_):
            calls.lines.append("end")

        def export_chrome_trace(self, path):
            Path(path).write_bytes(json.dumps(written).replace("\\u0001", "\x01").encode() + b"")

    monkeypatch.setattr(breakdown, "profile", calls.stand_in("profile", lambda activities: Profile()))
    ranges = lambda name: contextlib.nullcontext()  # noqa: E731
    monkeypatch.setattr(breakdown, "record_function", calls.stand_in("range", ranges))
    steps = calls.thing("steps", run=None, read_figures=None)
    assert breakdown.trace_steps(steps, 5, 6) == written["traceEvents"]
    cpu, cuda = breakdown.ProfilerActivity.CPU, breakdown.ProfilerActivity.CUDA
    assert calls.lines == [
        "synchronize()", f"profile(activities=[{cpu!r}, {cuda!r}])", "begin", "range('training step 5')",
        "steps.run(5)", "range('training step 6')", "steps.run(6)", "steps.read_figures()", "synchronize()", "end",
    ]  # fmt: skip
    monkeypatch.setattr(breakdown, "GPU", False)
    calls.lines.clear()
    breakdown.trace_steps(steps, 1, 1)
    assert f"profile(activities=[{cpu!r}])" in calls.lines and "synchronize()" not in calls.lines


def test_lengths_of_intervals_are_counted_once():
    for intervals, length in (
        ([], 0), ([(1, 3)], 2), ([(1, 3), (2, 5)], 4), ([(2, 5), (1, 3)], 4), ([(1, 9), (2, 3), (4, 5)], 8),
        ([(1, 2), (2, 3)], 2), ([(1, 2), (5, 7)], 3),
    ):  # fmt: skip
        assert breakdown.covered_length(intervals) == length


def test_the_command_prints_where_each_step_goes(monkeypatch, capsys):
    record = {"wall_ms": 10.0, "launches": 3, "syncs": 2, "top": [], "syncs_where": {"a in b": 2},
              "kinds": {"GEMM": {"ms": 6.0, "share": 0.6}}}  # fmt: skip
    monkeypatch.setattr(breakdown, "measure_breakdown", lambda name, smoke: record)
    breakdown.main(["--smoke", "--only", "tinyllama-1.1b"])
    out = capsys.readouterr().out.splitlines()
    assert out[-3:] == [
        "where a step of tinyllama-1.1b goes: 10.0 ms, 3 launches, 2 times the host waited for the device",
        "  GEMM" + " " * 64 + "6.00 ms   60.0%", "  a in b: 2 times",
    ]  # fmt: skip


def test_what_is_launched_at_the_first_moment_of_a_step_is_of_it():
    """And not of the one that ends there."""
    events = trace_of(*work("Memcpy DtoD", 200, 9, 7, dur=3))
    assert [breakdown.break_down_step(events, i, device=True)["launches"] for i in (0,)] == [1]
    third = [event(f"{breakdown.STEP}3", "user_annotation", 300, 100),
             event("cudaLaunchKernel", "cuda_runtime", 301, 1, correlation=3),
             event("_kernel", "kernel", 310, 50, correlation=3, stream=7)]  # fmt: skip
    assert breakdown.break_down_step([*events, *third], 1, device=True)["launches"] == 2


def test_an_operator_that_begins_with_the_one_inside_it_is_around_it():
    outer, inner = event("outer", "cpu_op", 5, 10), event("inner", "cpu_op", 5, 4)
    for events in ([outer, inner], [inner, outer]):
        found = {e["name"]: around for e, around in breakdown.nest_host_events(events)}
        assert found == {"outer": [], "inner": ["outer"]}


def test_a_call_outside_operators_tells_when_and_the_operators_id_what():
    """A graph's kernels are launched later than the operators that made them ran."""
    later = [
        event("aten::add", "cpu_op", 110, 5, **{"External id": 77}),
        event("cudaGraphLaunch", "cuda_runtime", 220, 1, correlation=9),
        event("some_kernel", "kernel", 245, 4, correlation=9, stream=7, **{"External id": 77}),
    ]
    third = [event(f"{breakdown.STEP}3", "user_annotation", 300, 100),
             event("cudaLaunchKernel", "cuda_runtime", 301, 1, correlation=3),
             event("_kernel", "kernel", 310, 50, correlation=3, stream=7)]  # fmt: skip
    assert breakdown.break_down_step(trace_of(*later), 0, device=True)["launches"] == 1
    found = breakdown.break_down_step(trace_of(*later, *third), 1, device=True)
    assert found["launches"] == 2 and found["top"][1]["name"] == "some_kernel"
