"""Decoding SmolLM2-135M in bf16 on a CPU: ours, torch's operators, transformers' generate and llama.cpp, in one run.

    python -m scripts.speed.decoding --gguf smollm2-bf16.gguf --json benchmarks/decoding.json

All answer the same prompt greedily, in turn, with one thread and with all. A figure is seconds a token from the first
token of the answer to its last, and CPU seconds of all threads, which other programs on the machine lengthen less.
llama.cpp runs where llama_cpp_python is installed, on --gguf: the folder that engine.export --dtype bf16 writes, as
llama.cpp's convert_hf_to_gguf.py --outtype bf16 converts it. Beside it stand the rate at which memory is read in the
same run, since a token reads every weight once, and with how many tokens each answer begins as the same weights do in
fp32.
"""

import json
import os
import sys
import tempfile
import time
from argparse import Namespace

import numpy as np
import torch
import transformers

from data_gen.base.cli import run_for_reader
from engine.base.device import choose_kernels
from engine.inference.generation import generate
from engine.model.llama import new_model
from engine.serving.models import load_model
from engine.text.templates import Row, encode_prompt
from kernels.native.cpu import load_cpu
from kernels.native.few_rows import multiply_few_rows
from scripts.base.results import describe_cpu, new_json_parser, summarize, summarize_ratios, today, write_json
from scripts.parity.curves import run_module

try:
    import llama_cpp
except ImportError:
    llama_cpp = None

PROMPT = "Name three uses for a paper clip."


class Clock:
    """Called once a token. It keeps the ids, and the wall and CPU seconds from the first one to the last."""

    def __init__(self):
        self.ids, self.times = [], []

    def __call__(self, token):
        self.ids.append(int(token))
        self.times.append((time.perf_counter(), time.process_time()))

    def seconds_a_token(self):
        """Return (wall, CPU)."""
        return tuple((b - a) / (len(self.times) - 1) for a, b in zip(self.times[0], self.times[-1], strict=True))


class Ours:
    """engine.inference.generation: in C++, or with torch's operators for a model of the references."""

    def __init__(self, model):
        self.model = model

    def answer(self, prompt, n, clock):
        """Tell the clock n tokens."""
        generate(self.model, [prompt], (), n, on_token=lambda _, token: clock(token))


class Transformers:
    """model.generate() of transformers, which streams its tokens."""

    def __init__(self, folder):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.model.generation_config.eos_token_id = None

    def answer(self, prompt, n, clock):
        """Tell the clock n tokens."""
        seen = []

        class Streamer(transformers.generation.BaseStreamer):
            def put(self, ids):
                seen.append(ids)
                if len(seen) > 1:  # the first are the prompt's
                    clock(ids[0])

            def end(self):
                pass

        self.model.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False, streamer=Streamer())


class LlamaCpp:
    """llama.cpp's own forward; the likeliest token is picked by NumPy."""

    def __init__(self, path, threads):
        self.model = llama_cpp.Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def answer(self, prompt, n, clock):
        """Tell the clock n tokens."""
        self.model.reset()
        self.model.eval(prompt)
        for i in range(n):
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.model.ctx, -1), (self.model.n_vocab(),))
            clock(logits.argmax())
            if i < n - 1:
                self.model.eval(clock.ids[-1:])


def measure_reading(threads, gigabytes=0.25):
    """Return the GB a CPU second at which our product of one row reads bf16 weights, the best of ten times."""
    w = torch.zeros(int(gigabytes * 1e9 / 2 / 4096), 4096, dtype=torch.bfloat16)
    x, seconds = torch.ones(1, 4096), []
    for _ in range(10):
        began = time.process_time()
        multiply_few_rows(load_cpu(), x, w, threads)
        seconds.append(time.process_time() - began)
    return w.nbytes / min(seconds) / 1e9


def widen(model):
    """Return an fp32 model of the same weights."""
    wide = new_model(model.config, "cpu", torch.float32, model.impl)
    with torch.no_grad():
        for to, weights in zip(wide.parameters(), model.parameters(), strict=True):
            to.copy_(weights)
    return wide


def count_equal(ids, others):
    """Return how many ids two answers begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(ids, others, strict=True)) if a != b), len(ids))


def measure(contenders, prompt, n, rounds):
    """Return {name: (wall, CPU) seconds a token of each round}, {name: ids} and the load average of each round."""
    seconds, ids, load = {name: [] for name in contenders}, {}, []
    for turn in range(rounds + 1):
        for name, contender in contenders.items():
            clock = Clock()
            contender.answer(prompt, n, clock)
            ids[name] = clock.ids
            if turn:  # the first warms up
                wall, cpu = clock.seconds_a_token()
                seconds[name].append((wall, cpu))
                print(f"{name}: {1e3 * wall:.1f} ms a token, CPU {1e3 * cpu:.1f}", flush=True)
        load.append(os.getloadavg()[0])
    return seconds, ids, load


def describe_run(contenders, prompt, truth, rounds, threads):
    """Return the figures of one number of threads. truth: the ids of the same weights in fp32."""
    torch.set_num_threads(threads)
    seconds, ids, load = measure(contenders, prompt, len(truth), rounds)
    wall, cpu = ({name: [pair[i] for pair in pairs] for name, pairs in seconds.items()} for i in (0, 1))
    return {
        "threads": threads, "load_average": summarize(load), "read_gb_per_cpu_s": measure_reading(threads),
        "ms_a_token": {name: summarize(1e3 * s for s in times) for name, times in wall.items()},
        "cpu_ms_a_token": {name: summarize(1e3 * s for s in times) for name, times in cpu.items()},
        "ratio": {name: summarize_ratios(times, wall["cria"]) for name, times in wall.items() if name != "cria"},
        "cpu_ratio": {name: summarize_ratios(times, cpu["cria"]) for name, times in cpu.items() if name != "cria"},
        "tokens_as_in_fp32": {name: count_equal(found, truth) for name, found in ids.items()},
    }  # fmt: skip


def parse_arguments() -> Namespace:
    parser = new_json_parser(__doc__)
    parser.add_argument("--gguf", default="", help="the model in bf16, for llama.cpp")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    return parser.parse_args()


def main():
    args = parse_arguments()
    cpu = torch.device("cpu")
    model, tokenizer, _ = load_model("smollm2-135m", cpu, torch.bfloat16, choose_kernels("auto", cpu, torch.bfloat16))
    prompt = encode_prompt(Row("", None, PROMPT), tokenizer)
    truth = generate(widen(model), [prompt], (), args.tokens)[0]
    with_torch, *_ = load_model("smollm2-135m", cpu, torch.bfloat16, "ref")
    contenders = {"cria": Ours(model), "cria, torch's operators": Ours(with_torch)}
    runs = []
    with tempfile.TemporaryDirectory() as tmp:
        run_module("engine.export", "--model", "smollm2-135m", "--out", f"{tmp}/hf", "--dtype", "bf16")
        contenders["transformers"] = Transformers(f"{tmp}/hf")
        with_llama_cpp = bool(llama_cpp and args.gguf)
        if not with_llama_cpp:
            print("llama.cpp is left out: it wants llama_cpp_python and --gguf")
        for threads in args.threads:
            if with_llama_cpp:
                contenders["llama.cpp"] = LlamaCpp(args.gguf, threads)
            runs.append(describe_run(contenders, prompt, truth, args.rounds, threads))
    result = {
        "what": "SmolLM2-135M decoding in bf16 on CPU, one prompt, greedy, in turns", "tokens": args.tokens,
        "rounds": args.rounds, "weight_bytes": sum(p.nbytes for p in model.parameters()), "runs": runs,
        "instruction_set": load_cpu().cria_instruction_set().decode(), **describe_cpu(), "torch": torch.__version__,
        "transformers": transformers.__version__, "date": today(),
        "llama_cpp_python": llama_cpp.__version__ if with_llama_cpp else None,
    }  # fmt: skip
    write_json(args.json, result)
    print(json.dumps(runs, indent=1, default=float))


if __name__ == "__main__":
    sys.exit(run_for_reader(main))
