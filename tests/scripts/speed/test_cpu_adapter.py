"""LoRA on a CPU, beside all weights and beside PEFT: contenders, peaks, ratios."""

import contextlib
import itertools
import re
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from tests.helpers.calls import FOLDER, Calls
from tests.helpers.clocks import Ticks


@pytest.mark.parametrize("name", ["all weights", "lora", "peft"])
def test_a_contender_trains_what_its_name_says(name, load_beside_stand_in, monkeypatch):
    adapter = load_beside_stand_in("scripts.speed.cpu_adapter")
    contest, lengths = adapter.Contest("", 9, "folder"), SimpleNamespace(lengths=lambda: np.array([2]))
    contest.__dict__ |= {"rows": [], "dataset": lengths}
    monkeypatch.setattr(adapter, "encode_rows", lambda *_: [([1, 2], [1, 2])])
    monkeypatch.setattr(adapter, "find_embedded_gguf", lambda: "gguf")
    monkeypatch.setattr(adapter, "open_source", lambda path: "source")
    monkeypatch.setattr(adapter, "Ours", lambda source, dataset, dtype, impl, config=None: ("ours", dtype, config))
    monkeypatch.setattr(adapter, "Peft", lambda folder, examples, dtype: ("peft", dtype))
    wanted = {
        "all weights": ("ours", torch.float32, None), "lora": ("ours", torch.float32, adapter.ADAPTER),
        "peft": ("peft", torch.float32),
    }  # fmt: skip
    assert contest.make(name, torch.float32) == wanted[name]


def test_a_peak_is_what_the_steps_add_and_a_ratio_that_of_lora(load_beside_stand_in, monkeypatch, tmp_path, call_main):
    adapter = load_beside_stand_in("scripts.speed.cpu_adapter")
    peaks = iter([100, 175])
    stepper = SimpleNamespace(step=lambda examples, micro: None)
    contest = SimpleNamespace(dataset=None, make=lambda name, dtype: stepper)
    monkeypatch.setattr(adapter, "read_peak", lambda: next(peaks))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    assert adapter.measure_peak(contest, "lora", {"threads": 1, "dtype": "fp32", "micro": 1}, [[0]]) == 75
    status = tmp_path / "status"
    status.write_text("VmPeak:\t 9 kB\nVmHWM:\t  7 kB\nVmRSS:\t 5 kB\n")
    monkeypatch.undo()
    monkeypatch.setattr(adapter, "Path", lambda _: status)
    assert adapter.read_peak() == 7 * 1024


def test_peft_trains_an_adapter_of_the_same_shape_in_the_weights_dtype(load_beside_stand_in, monkeypatch):
    adapter, calls = load_beside_stand_in("scripts.speed.cpu_adapter"), Calls()
    peft = ModuleType("peft")
    peft.LoraConfig = calls.stand_in("LoraConfig", "config")
    peft.get_peft_model = calls.stand_in("get_peft_model", "model")
    monkeypatch.setitem(sys.modules, "peft", peft)
    base = SimpleNamespace(from_pretrained=calls.stand_in("from_pretrained", "base"))
    monkeypatch.setattr(adapter.transformers, "LlamaForCausalLM", base)
    loop = calls.thing("loop", step=None)

    def make(folder, load, **settings):
        assert load(folder, torch.bfloat16) == "model"
        return loop

    monkeypatch.setattr(adapter, "TransformersLoop", calls.stand_in("TransformersLoop", make))
    adapter.Peft("folder", "abcdef", torch.bfloat16).step([4, 1], 2)
    maps = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert calls.lines == [
        f"LoraConfig(r=16, lora_alpha=32.0, target_modules={maps})",
        "TransformersLoop('folder', lr=0.0001, total_steps=1000, dtype=torch.bfloat16, fused=True, load=function)",
        "from_pretrained('folder', dtype=torch.bfloat16)",
        "get_peft_model('base', 'config', autocast_adapter_dtype=False)",
        "loop.step(['e', 'b'], 2)",
    ]  # fmt: skip


class Rows:
    """Twenty rows."""

    label = "rows"

    def __len__(self):
        return 20

    def lengths(self):
        return np.arange(20) * 3 + 30

    def loss_tokens(self):
        return np.arange(20) + 9


def test_the_whole_measurement(load_beside_stand_in, monkeypatch, tell, snapshot):
    """How every contender is made, the rows of every step, peaks in processes of their own, and every figure."""
    adapter, calls = load_beside_stand_in("scripts.speed.cpu_adapter"), Calls()
    steps = sys.modules["scripts.speed.cpu_step"]
    Ticks(monkeypatch, steps)
    rows, peaks = [SimpleNamespace(instruction="i", input="", output="o")] * 20, itertools.count(10**9, 123456789)
    stand_ins = {
        "find_embedded_gguf": "gguf", "open_source": "source", "load_tokenizer": "tokenizer", "run_module": None,
        "read_rows": (rows, []), "encode_rows": [([0] * n, []) for n in Rows().lengths()],
        "Ours": calls.thing("ours", step=None), "Peft": calls.thing("peft", step=None),
        "read_peak": lambda: next(peaks),
    }  # fmt: skip
    for name, result in stand_ins.items():
        monkeypatch.setattr(adapter, name, calls.stand_in(name, result))
    monkeypatch.setattr(adapter.data, "encode_rows", calls.stand_in("our encode", calls.thing("table", select=Rows())))
    tokenizers = SimpleNamespace(from_pretrained=calls.stand_in("their tokenizer", "their tokenizer"))
    monkeypatch.setattr(adapter.transformers, "AutoTokenizer", tokenizers)
    sizes = {adapter.WHOLE: (1024, 2048), adapter.LORA: (512, 4096), adapter.PEFT: (1, 4)}
    monkeypatch.setattr(adapter, "SIZES_OF", sizes)
    monkeypatch.setattr(adapter.importlib.metadata, "version", lambda name: f"{name}'s")
    done = lambda call, *args: SimpleNamespace(result=lambda: call(*args))  # noqa: E731
    pool = lambda n, context: contextlib.nullcontext(SimpleNamespace(submit=done))  # noqa: E731
    monkeypatch.setattr(adapter, "ProcessPoolExecutor", calls.stand_in("pool", pool))
    monkeypatch.setattr(adapter.multiprocessing, "get_context", lambda kind: kind)
    flags = ("--data", "dir/mine.json", "--batch", 3, "--rounds", 2, "--max-length", 77, "--dtypes", "bf16", "fp32")
    assert tell(adapter, *flags) == snapshot
    log = re.sub(r"\[namespace.*?o'\)\]", "rows", re.sub(r"\(\[0(, 0)*\], \[\]\)", "R", calls.text()))
    log = re.sub(r"\[({'instruction': 'i', 'input': '', 'output': 'o'}(, )?){20}\]", "rows", log)
    assert re.sub(FOLDER, "FOLDER", log) == snapshot(name="calls")


def test_both_train_on_equal_tokens(load_beside_stand_in, monkeypatch):
    adapter = load_beside_stand_in("scripts.speed.cpu_adapter")
    contest = adapter.Contest("", 9, "folder")
    contest.__dict__ |= {"rows": [], "dataset": Rows()}
    monkeypatch.setattr(adapter, "encode_rows", lambda *_: [([1, 2], [1, 2])])
    with pytest.raises(AssertionError, match="both train on equal tokens"):
        contest.make("peft", torch.float32)


def test_by_default_both_dtypes_are_probed_on_the_seed_tasks(load_beside_stand_in, monkeypatch):
    adapter = load_beside_stand_in("scripts.speed.cpu_adapter")
    monkeypatch.setattr(sys, "argv", ["cpu_adapter", "--json", "x"])
    assert vars(adapter.parse_arguments()) == {
        "json": "x", "data": str(adapter.SEED_TASKS), "batch": 32, "rounds": 5, "dtypes": ["fp32", "bf16"],
        "max_length": 512,
    }  # fmt: skip
    assert adapter.SIZES_OF == {
        "all weights": (1024, 2048, 4096), "lora": (1024, 2048, 4096), "peft": (1, 2, 4, 8)
    }  # fmt: skip
