"""Measurements of whole training steps: figures, kinds of kernels, failures and memory, at toy size on a CPU."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine import packing
from engine.cards import CARDS
from engine.config import MODELS
from engine.model import new_model
from engine.optim import AdamW, lr_factor
from engine.weights import open_source
from scripts import gpu_report, step_bench, step_common, step_peers, step_profile

H100 = CARDS["H100"]


def strict_json(path):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


# ---- rows and figures -----------------------------------------------------------------------------------------------


def test_rows_are_alpacas_and_logical_tokens_leave_out_padding():
    rows = step_common.alpaca_rows(3, smoke=False)
    assert len(rows) == 3 * 128 and rows.lengths().max() <= 512
    mean = np.minimum(512, np.add(*step_common.alpaca_lengths()[:2])).mean()
    assert rows.lengths().mean() == pytest.approx(mean, rel=0.1)
    assert rows.loss_tokens().min() > 0
    prompt, response, has_input, n_shared = step_common.alpaca_lengths()
    for example in (0, 200, 383):
        i = int(rows.sources[example])
        n = min(512, prompt[i] + response[i])
        assert rows.is_target_of(example).tolist() == [False] * prompt[i] + [True] * (n - prompt[i])
    stems = {tuple(rows.tokens_of(e)[: n_shared[has_input[int(rows.sources[e])]]]) for e in range(100)}
    assert len(stems) == 2
    again = step_common.alpaca_rows(5, smoke=False)  # the same rows first, whatever the number of steps
    assert (again.lengths()[:384] == rows.lengths()).all() and (again.tokens[:100] == rows.tokens[:100]).all()


def test_mfu_and_speed():
    n = MODELS["llama-7b"].n_parameters
    found = step_common.speed(n, [16000, 17000], [12000, 12500], [1.0, 0.5], H100)
    assert found["tokens_per_s"] == 22000 and found["computed_tokens_per_s"] == pytest.approx(24500 / 1.5)
    assert found["mfu"] == pytest.approx(6 * 6.738e9 * 22000 / 989e12, rel=1e-3)
    assert found["mfu_formula"] == "6 x 6.738e+09 x logical tokens/s / 9.89e+14 (dense bf16 peak of H100)"
    assert (found["step_s_median"], found["step_s_min"], found["step_s_max"]) == (0.75, 0.5, 1.0)
    assert found["computed_over_logical"] == 24500 / 33000 and found["steps"] == 2
    assert step_common.mfu(n, 1e4, None)["mfu"] is None


def test_the_whole_run_is_projected_from_the_step():
    found = step_common.projection({"name": "x", "tokens_per_s": 22000.0}, H100)
    assert found["steps"] == 1221 and found["tokens"] == pytest.approx(19.8e6, rel=0.01)
    assert found["minutes"] == pytest.approx(19.8e6 / 22000 / 60, rel=0.01)
    assert found["dollars"] == pytest.approx(found["minutes"] / 60 * H100.price_per_hour)
    assert "projected from the measured step" in found["what"] and found["price_of"]
    assert step_common.projection({"name": "x", "tokens_per_s": 1.0}, None)["dollars"] is None


def test_every_variant_names_a_model_and_what_is_wanted_comes_first():
    assert list(step_bench.VARIANTS)[:2] == [step_bench.MAIN, step_bench.UNSHARED]
    main = step_bench.VARIANTS[step_bench.MAIN]
    assert main.steps >= 30 and (main.recompute, main.master, main.states, main.sharing) == (
        "cheap",
        "split",
        "8bit",
        1,
    )
    for name, variant in step_bench.VARIANTS.items():
        assert name.split(", ")[0] == variant.model in MODELS
    assert {name.split(", ")[0] for name in step_peers.PEERS} <= set(step_bench.VARIANTS)  # a ratio for each
    assert set(step_profile.PROFILED) | set(step_bench.SMOKE) <= set(step_bench.VARIANTS)


# ---- steps ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def plain():
    return step_bench.Variant(impl="ref")


def test_sharing_and_cuts_change_no_loss(plain):
    a, b, c = (
        step_bench.measure(replace(plain, **changes), smoke=True)
        for changes in ({}, {"sharing": False}, {"tokens": 130, "recompute": "block"})
    )
    assert a["tokens_a_step"] == b["tokens_a_step"] and a["computed_over_logical"] < b["computed_over_logical"] == 1
    assert c["micro_batches_a_step"] > a["micro_batches_a_step"] and c["largest_micro_batch_tokens"] <= 130
    for other in (b, c):
        assert other["first_loss"] == pytest.approx(a["first_loss"], rel=1e-5)
        assert other["last_loss"] == pytest.approx(a["last_loss"], rel=1e-5)
    assert a["first_loss"] == pytest.approx(math.log(256), abs=0.1) and a["all_finite"]
    assert a["estimate_gib"] > a["estimate_of_tensors_gib"] > 0


def test_a_step_is_the_training_loops(plain):
    """The same losses as engine.finetune's pieces in a plain loop."""
    found = step_bench.Steps(plain, 384, 3, smoke=True)
    for step in (1, 2, 3):
        found.take(step)
    found.read()
    found.close()
    rows = step_common.alpaca_rows(3, smoke=True)
    model = new_model(step_common.TOY, "cpu", torch.float32, "ref")
    model.init_weights(0)
    optimizer = AdamW(model, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, states="8bit", impl="ref")
    for step in (1, 2, 3):
        examples = step_common.examples_of(step, True)
        scale = 1 / rows.loss_tokens()[examples].sum()
        losses = [model.loss(b) for b in packing.micro_batches(rows, examples, 384, scale=scale)]
        sum(losses).backward()
        optimizer.step(2e-5 * lr_factor("cosine", step, 1221, 0.03), optimizer.grad_norm(), 1.0)
        optimizer.zero_grad()
        assert found.losses[step - 1] == pytest.approx(sum(losses).item(), rel=1e-6)
    assert found.tokens == [int(rows.lengths()[step_common.examples_of(s, True)].sum()) for s in (1, 2, 3)]


def test_out_of_memory_halves_and_is_recorded(plain, monkeypatch):
    tried, take = [], step_bench.Steps.take

    def small(self, step):
        tried.append(self.max_tokens)
        if self.max_tokens > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. And more")
        take(self, step)

    monkeypatch.setattr(step_bench.Steps, "take", small)
    record = step_bench.measure(plain, smoke=True)
    assert record["out_of_memory_at"] == [384, 192] and record["tokens"] == 96 and tried == [384, 192, 96, 96]
    assert "out of memory at [384, 192]" in step_common.line({"name": "x", **record})
    monkeypatch.setattr(step_bench.Steps, "take", lambda self, step: oom())
    with pytest.raises(step_common.TooLarge, match="out of memory at 384, 192, 96: CUDA out of memory"):
        step_bench.measure(plain, smoke=True)


def oom():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried")


def test_past_the_time_a_variant_ends_early(plain, monkeypatch):
    monkeypatch.setattr(step_bench, "LEAST_STEPS", 1)
    assert step_bench.measure(plain, True, lambda: True)["steps"] == 1
    assert step_bench.measure(plain, True, lambda: False)["steps"] == 2


# ---- processes ------------------------------------------------------------------------------------------------------


def test_a_failure_is_recorded_and_the_rest_goes_on(tmp_path):
    records = step_common.Records(tmp_path / "r.json")
    records.attempt("a", lambda: 1 / 0)
    records.attempt("b", lambda: {"last_loss": float("nan"), "kinds": {"a": np.float32(2)}})
    with pytest.raises(RuntimeError):  # the device can be used no more
        records.attempt("c", lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: an illegal memory access")))
    records.deadline = 0
    records.attempt("d", lambda: pytest.fail("began after the time"))
    found = strict_json(tmp_path / "r.json")
    assert [r["name"] for r in found["records"]] == ["a", "b", "c"] and found["left_out"] == ["d"]
    assert found["records"][0]["failed"] == "ZeroDivisionError: division by zero"
    assert found["records"][1]["last_loss"] is None and "CUDA error" in found["records"][2]["failed"]


def test_a_process_that_dies_costs_what_it_was_at(tmp_path):
    report = gpu_report.Report(tmp_path / "report.json", minutes=1, smoke=True)
    began = []

    def run(command, limit, every):
        path = command[command.index("--json") + 1]
        names = command[command.index("--only") + 1 : -1]
        began.append(names)
        records = [{"name": n} for n in names[: names.index("dies")]] if "dies" in names else [{"name": names[0]}]
        left_out = [] if "dies" in names else names[1:]
        gpu_report.write_json(path, {"records": records, "left_out": left_out})
        every()
        return -11 if "dies" in names else 0

    step_common.in_processes(report, run, "step", "m", ["a", "dies", "b", "c"])
    part = json.loads(report.path.read_text())
    assert began == [["a", "dies", "b", "c"], ["dies", "b", "c"], ["b", "c"]]
    assert [r["name"] for r in part["parts"]["step"]["records"]] == ["a", "dies", "b"]
    assert part["parts"]["step"]["records"][1]["failed"] == "its process ended with exit code -11"
    assert part["left_out"] == ["step: c"]
    late = gpu_report.Report(tmp_path / "late.json", minutes=0, smoke=True)
    step_common.in_processes(late, run, "step", "m", ["a", "b"])
    assert late.result["left_out"] == ["step: a, b"] and len(began) == 3
    report.result["parts"] = {}
    step_common.in_processes(report, lambda *a, **k: None, "step", "m", ["a"])
    assert report.result["parts"]["step"]["records"] == [{"name": "a", "failed": "its process ended after its limit"}]


def test_ours_over_peers(tmp_path):
    parts = {
        "step": {"records": [
            {"name": "llama-7b", "tokens_per_s": 30.0}, {"name": "llama-7b, no sharing", "tokens_per_s": 20.0},
            {"name": "tinyllama-1.1b", "failed": "x"},
        ]},
        "peers": {"records": [
            {"name": "llama-7b, transformers", "tokens_per_s": 10.0}, {"name": "llama-7b, x", "absent": "y"},
            {"name": "tinyllama-1.1b, transformers", "tokens_per_s": 1.0},
        ]},
    }  # fmt: skip
    step_peers.compare(parts)
    a, b, c = parts["peers"]["records"]
    assert (a["ours_over_peer"], a["ours_without_sharing_over_peer"]) == (3.0, 2.0)
    assert "ours_over_peer" not in {**b, **c}


# ---- where the time goes --------------------------------------------------------------------------------------------

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
    "_update_kernel": "optimizer", "_partial_kernel": "gradient norm", "_total_kernel": "gradient norm",
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
    assert step_profile.kind_of(name, []) == NAMES[name]


def test_operators_tell_where_names_do_not():
    kind_of = step_profile.kind_of
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
    import kernels

    assert kernels
    names = {f"cria::{name.split('::')[1].split('.')[0]}" for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("cria::")}  # fmt: skip
    assert names and names <= set(step_profile.KIND_OF), names - set(step_profile.KIND_OF)


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
        t.launch(["cria::adamw_update"], "_update_kernel", began + 40, began + 1250, 100, call=False)
        t.launch(["aten::copy_"], "Memcpy HtoD (Pinned -> Device)", began + 50, began + 510, 30, stream=13, tid=3,
                 cat="gpu_memcpy")  # fmt: skip
        t.add("cuda_runtime", "cudaEventSynchronize", began + 60, 5, 1, correlation=10**6 + step)
    return t


def test_a_step_of_a_trace(trace):
    found = step_profile.breakdown(trace.events, 1, device=True)
    assert found["wall_ms"] == 1.0 and found["busy_ms"] == 0.8 and found["launches"] == 4
    ms = {kind: part["ms"] for kind, part in found["kinds"].items() if part["ms"]}
    assert ms == {"norms": 0.1, "GEMM": 0.4, "swiglu": 0.2, "optimizer": 0.1, "gaps": pytest.approx(0.2)}
    assert sum(part["share"] for part in found["kinds"].values()) == pytest.approx(1)
    assert set(found["kinds"]) == set(step_profile.ALL) and found["other_streams_ms"] == 0.03
    assert found["top"][0] == {"name": "nvjet_tst_1", "kind": "GEMM", "ms": 0.4, "share": 0.4, "times": 1}
    assert (found["syncs"], found["event_waits"], found["pageable_copies"]) == (0, 1, 0)
    assert found["host_calls"]["cuLaunchKernelEx"] == 4


def test_a_wait_of_the_host_is_found(trace):
    trace.add("cpu_op", "aten::item", 1100, 50, 1)
    trace.add("cuda_runtime", "cudaMemcpyAsync", 1110, 5, 1)
    trace.add("cuda_runtime", "cudaStreamSynchronize", 1120, 20, 1)
    trace.add("cuda_runtime", "cudaDeviceSynchronize", 3500, 20, 1)  # the profiler's own, after the step
    found = step_profile.breakdown(trace.events, 1, device=True)
    assert found["syncs"] == 1 and found["syncs_where"] == {"cudaStreamSynchronize in aten::item": 1}
    for name, waits in (("cudaStreamSynchronize", 1), ("cuStreamSynchronize", 1), ("cudaDeviceSynchronize", 1),
                        ("cudaMemcpy", 1), ("cudaFree", 1), ("cudaMemcpyAsync", 0), ("cudaStreamWaitEvent", 0),
                        ("cudaEventSynchronize", 0), ("cudaMemsetAsync", 0)):  # fmt: skip
        assert bool(step_profile.WAITS.match(name)) == waits, name


def test_a_trace_without_kernels_is_no_trace_of_a_device():
    t = Trace()
    t.add("user_annotation", "training step 1", 0, 10)
    t.add("user_annotation", "training step 2", 10, 10)
    with pytest.raises(RuntimeError, match="saw no kernel"):
        step_profile.breakdown(t.events, 0, device=True)


def test_on_a_cpu_operators_take_what_those_inside_them_do_not(monkeypatch):
    monkeypatch.setitem(step_profile.VARIANTS, "llama-7b", step_bench.Variant(impl="ref"))
    found = step_profile.measure("llama-7b", smoke=True)
    kinds = found["kinds"]
    assert sum(part["share"] for part in kinds.values()) == pytest.approx(1, abs=1e-6)
    assert kinds["GEMM"]["ms"] > 0 and kinds["gaps"]["ms"] > 0 and found["syncs"] == 0
    assert len(found["top"]) == 15 and found["launches"] > 100
    text = "\n".join(step_profile.table({"records": [{"name": "llama-7b", **found}, {"name": "x", "failed": "y"}]}))
    assert "0 times the host waited" in text and "of x goes: failed: y" in text


# ---- peers ----------------------------------------------------------------------------------------------------------


def test_a_peer_takes_our_step(plain, tmp_path):
    """Padded, it has the losses of our packed steps from the same weights, before and after an update."""
    pytest.importorskip("transformers")
    loop = step_peers.Loop(step_peers.PEERS["llama-7b, transformers"], smoke=True)
    loop.model.save_pretrained(tmp_path)
    ours = step_bench.Steps(replace(plain, states="fp32"), 384, 2, smoke=True)
    open_source(tmp_path).read_into(ours.model)
    for group in loop.optimizer.param_groups:
        group["lr"] = 0.0  # as the warm-up's first
    for step, n in ((1, 2), (2, 4)):
        ours.take(step)
        loss, tokens, padded = loop.step(step, n)
        ours.read()
        assert ours.losses[-1] == pytest.approx(loss.item(), rel=1e-5) and tokens == ours.tokens[-1] < padded
    ours.close()


def test_micro_batches_of_peers_hold_every_token_once():
    rows = step_common.alpaca_rows(1, smoke=True)
    examples = step_common.examples_of(1, True)
    batches = list(step_peers.micro_batches(rows, examples, 4))
    assert [len(ids) for ids, *_ in batches] == [4, 2]
    assert batches[0][0].shape[1] == rows.lengths().max()
    assert sum(int(mask.sum()) for _, mask, _ in batches) == rows.lengths().sum()
    assert sum(int((labels != -100).sum()) for *_, labels in batches) == rows.loss_tokens().sum()
    for ids, mask, labels in batches:
        assert (labels[labels != -100] == ids[labels != -100]).all() and not mask[labels == -100][-1:].any()


def test_a_peer_that_is_not_there_is_absent(monkeypatch):
    find = step_peers.importlib.util.find_spec
    monkeypatch.setattr(step_peers.importlib.util, "find_spec", lambda name: None if "liger" in name else find(name))
    record = step_peers.measure("llama-7b, transformers + liger", smoke=True)
    assert record["absent"] == "liger-kernel is not installed" and "tokens_per_s" not in record


def test_peers_halve_too(monkeypatch):
    step, tried = step_peers.Loop.step, []

    def small(self, number, n):
        tried.append(n)
        return oom() if n > 1 else step(self, number, n)

    monkeypatch.setattr(step_peers.Loop, "step", small)
    record = step_peers.measure("llama-7b, transformers", smoke=True)
    assert record["rows"] == 1 and record["out_of_memory_at"] == [2] and tried == [2, 1, 1]
    assert record["tokens_per_s"] > 0 and record["first_loss"] == pytest.approx(math.log(256), abs=0.1)
