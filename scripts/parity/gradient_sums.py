"""What summing gradients over micro-batches in bf16 costs, against sums in fp32 of the very same products.

    python -m scripts.parity.gradient_sums --json benchmarks/accumulation.json

SmolLM2-135M in bf16, one step's rows cut into 1, 2, ... micro-batches. The kernels' autograd functions run on their
operators' CPU twins, and the products dy.T @ x of every weight are summed three ways: into a bf16 gradient in the
GEMM's epilogue, as training does; rounded to bf16 and then added in bf16, as autograd does; in fp32. Errors are
relative L2 norms over all matrices. "bf16 itself" is what the fp32 sums are off from the gradient of the same weights
in fp32.
"""

import argparse
import json
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from engine.data import dataset as data
from engine.data import packing
from engine.data.rows import read_rows
from engine.formats.find import embedded_gguf
from engine.formats.source import open_source
from engine.model.llama import new_model
from engine.text.tokenizer import load_tokenizer

SEED_TASKS = Path(__file__).parents[2] / "data_gen" / "seed_tasks.jsonl"
OPS = ("attention", "documents", "linear_add", "linear_cross_entropy", "rms_norm", "swiglu")


class Sums:
    """Every product that belongs to a weight's gradient, summed in fp32 and, rounded one by one, in bf16."""

    def __init__(self):
        self.fp32, self.apart = {}, {}

    def add(self, weight, dy, x):
        product = dy.T.float() @ x.float()
        wide = self.fp32.setdefault(weight, torch.zeros_like(product))
        wide += product
        if weight in self.apart:
            self.apart[weight] += product.bfloat16()
        else:
            self.apart[weight] = product.bfloat16()


def watched(sums):
    """Has the kernels' functions run on a CPU, and `sums` see their products."""
    for name in OPS:
        module = import_module(f"kernels.ops.{name}")
        if hasattr(module, "choose"):
            module.choose = lambda op, impl, x: "triton"
    for name in ("linear_add", "norm_linear", "swiglu"):
        module = import_module(f"kernels.ops.{name}")
        real = module.weight_gradient

        def gradient(dy, x, into, real=real):
            sums[0].add(into, dy, x)
            return real(dy, x, into)

        module.weight_gradient = gradient


def error(found, truth):
    """|found - truth| / |truth| over all matrices."""
    off = sum((a.double() - b.double()).square().sum() for a, b in zip(found, truth, strict=True))
    return float((off / sum(b.double().square().sum() for b in truth)).sqrt())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(SEED_TASKS), help="Alpaca JSON or JSONL (the embedded seed tasks)")
    parser.add_argument("--rows", type=int, default=8, help="examples of the step")
    parser.add_argument("--json", required=True, help="where the figures go")
    args = parser.parse_args()

    gguf = embedded_gguf()
    source, tokenizer = open_source(gguf), load_tokenizer(gguf)
    dataset = data.tokenize(read_rows([Path(args.data)])[0][: args.rows], tokenizer, max_length=256)
    examples, sums = np.arange(len(dataset)), [Sums()]
    scale = 1 / dataset.loss_tokens().sum()
    model = new_model(source.config, "cpu", torch.bfloat16, accumulate=True)
    source.read_into(model)
    exact = new_model(source.config, "cpu", torch.float32, "ref")
    with torch.no_grad():
        for p, q in zip(exact.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    for batch in packing.micro_batches(dataset, examples, 2048, scale=scale):
        exact.loss(batch).backward()
    watched(sums)
    figures = []
    for n in (1, 2, 4, 8):
        model.zero_grad()
        sums[0] = Sums()
        for part in np.array_split(examples, n):
            for batch in packing.micro_batches(dataset, part, 10**9, scale=scale):
                model.loss(batch).backward()
        weights = list(sums[0].fp32)
        names = {p: name for name, p in model.named_parameters()}
        truth, wide = [dict(exact.named_parameters())[names[w]].grad for w in weights], [*sums[0].fp32.values()]
        figures.append({
            "micro_batches": n, "bf16 in the epilogue": error([w.grad for w in weights], wide),
            "bf16, rounded and added": error([*sums[0].apart.values()], wide), "bf16 itself": error(wide, truth),
        })  # fmt: skip
        print(figures[-1], flush=True)
    result = {
        "what": "relative error of gradients summed over micro-batches, SmolLM2-135M in bf16",
        "rows": Path(args.data).name, "examples": len(examples), "tokens": int(dataset.lengths().sum()),
        "matrices": len(weights), "figures": figures, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
