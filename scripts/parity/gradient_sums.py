"""The cost of summing gradients over micro-batches in bf16, measured against fp32 sums of the same products.

    python -m scripts.parity.gradient_sums --json benchmarks/accumulation.json

SmolLM2-135M in bf16 takes one step's rows in 1, 2, 4 and 8 micro-batches. The kernels' autograd functions run on their
operators' CPU twins. The products dy.T @ x of every weight are summed in three ways:

bf16 in the epilogue     into a bf16 gradient in the GEMM's epilogue, as training does
bf16, rounded and added  rounded to bf16 and then added in bf16, as autograd does
fp32                     the truth of both

Errors are relative L2 norms over all matrices. "bf16 itself" is the distance from the fp32 sums to the gradient of the
same weights in fp32.
"""

from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from data_gen.api.prompt import SEED_TASKS
from engine.data import dataset as data
from engine.data.packing import Packing, make_micro_batches
from engine.data.rows import read_rows
from engine.formats.find import find_embedded_gguf
from engine.formats.source import open_source
from engine.model.llama import new_model
from engine.text.tokenizer_files import load_tokenizer
from kernels.base.commands import run_command
from scripts.base.results import new_json_parser, today, write_json

OPS = ("attention", "attention_plan", "linear", "linear_cross_entropy", "rms_norm", "swiglu")  # have CPU twins


class Sums:
    """The products of every weight's gradient, summed in fp32 and, rounded one by one, in bf16."""

    def __init__(self):
        self.fp32, self.rounded = {}, {}

    def add(self, weight, dy, x):
        """Add the product dy.T @ x to both sums of a weight."""
        product = dy.T.float() @ x.float()
        if weight in self.fp32:
            self.fp32[weight] += product
            self.rounded[weight] += product.bfloat16()
        else:
            self.fp32[weight] = product
            self.rounded[weight] = product.bfloat16()


def run_kernels_on_cpu():
    """Make the kernels' functions choose their Triton operators, whose CPU twins then run."""
    for name in OPS:
        module = import_module(f"kernels.ops.{name}")
        if hasattr(module, "choose_impl"):
            module.choose_impl = lambda op, impl, x: "triton"


def watch_products(sums):
    """Make every weight gradient also add its product to sums[0]."""
    for name in ("linear", "norm_linear", "swiglu"):
        module = import_module(f"kernels.ops.{name}")
        real = module.weight_gradient

        def gradient(dy, x, into, real=real):
            sums[0].add(into, dy, x)
            return real(dy, x, into)

        module.weight_gradient = gradient


def relative_error(found, truth):
    """Return |found - truth| / |truth| over all matrices."""
    off = sum((a.double() - b.double()).square().sum() for a, b in zip(found, truth, strict=True))
    return float((off / sum(b.double().square().sum() for b in truth)).sqrt())


def exact_gradients(model, config, batches):
    """Return {name: gradient} of the model's weights in fp32 through the references."""
    exact = new_model(config, "cpu", torch.float32, "ref")
    with torch.no_grad():
        for p, q in zip(exact.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    for batch in batches:
        exact.loss(batch).backward()
    return {name: p.grad for name, p in exact.named_parameters()}


def main():
    parser = new_json_parser(__doc__)
    parser.add_argument("--data", default=str(SEED_TASKS), help="Alpaca JSON or JSONL (the embedded seed tasks)")
    parser.add_argument("--rows", type=int, default=8, help="examples of the step")
    args = parser.parse_args()

    gguf = find_embedded_gguf()
    source, tokenizer = open_source(gguf), load_tokenizer(gguf)
    dataset = data.encode_rows(read_rows([Path(args.data)])[0][: args.rows], tokenizer, max_length=256).select()
    examples, scale = np.arange(len(dataset)), 1 / dataset.loss_tokens().sum()
    model = new_model(source.config, "cpu", torch.bfloat16, accumulate=True)
    source.read_into(model)
    exact = exact_gradients(
        model, source.config, make_micro_batches(dataset.get_examples(examples), Packing(2048), scale=scale)
    )
    names = {p: name for name, p in model.named_parameters()}
    run_kernels_on_cpu()
    sums = [Sums()]
    watch_products(sums)
    figures = []
    for n in (1, 2, 4, 8):
        model.zero_grad()
        sums[0] = Sums()
        for part in np.array_split(examples, n):
            for batch in make_micro_batches(dataset.get_examples(part), Packing(10**9), scale=scale):
                model.loss(batch).backward()
        weights, fp32 = list(sums[0].fp32), list(sums[0].fp32.values())
        figures.append({
            "micro_batches": n, "bf16 in the epilogue": relative_error([w.grad for w in weights], fp32),
            "bf16, rounded and added": relative_error(sums[0].rounded.values(), fp32),
            "bf16 itself": relative_error(fp32, [exact[names[w]] for w in weights]),
        })  # fmt: skip
        print(figures[-1], flush=True)
    result = {
        "what": "relative error of gradients summed over micro-batches, SmolLM2-135M in bf16",
        "rows": Path(args.data).name, "examples": len(examples), "tokens": int(dataset.lengths().sum()),
        "matrices": len(weights), "figures": figures, "torch": torch.__version__, "date": today(),
    }  # fmt: skip
    write_json(args.json, result)


if __name__ == "__main__":
    run_command(main)
