"""LoRA against PEFT: gradients in fp64, curves of losses, adapters read by each other, merged models elsewhere.

QLoRA's curve is compared with that of PEFT on a base in bitsandbytes' 4 bits.

    python -m scripts.parity.adapters --data alpaca.json --json benchmarks/adapters.json

PEFT, transformers and llama.cpp (the package xllamacpp) are installed into an environment of their own, unless
--python names an interpreter that has them. Exits 1 where a figure is over its bound, see BOUNDS.
"""

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import kernels
from engine.base.device import DTYPES
from engine.data.rows import read_rows
from engine.formats.adapters import MergedSource, list_factors, open_adapter, save_adapter
from engine.formats.source import open_source
from engine.inference.generation import generate
from engine.model.llama import Transformer, new_model
from engine.serving.models import load_model
from engine.text.templates import ALPACA_INPUT, ALPACA_NO_INPUT
from engine.text.tokenizer import Tokenizer
from kernels.base.commands import run_command
from scripts.base.environment import make_environment
from scripts.base.results import ROOT, today, write_json
from scripts.base.rows import row_as_dict
from scripts.parity.curves import (
    describe_settings,
    finetune_curve,
    losses_of,
    new_curve_parser,
    run_module,
    worst_difference,
)

PACKAGES = ("bitsandbytes>=0.50,<0.51", "peft>=0.21,<0.22", "torch>=2.11,<2.14", "transformers>=5,<6", "xllamacpp")
SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
HEAD_DIM, THETA, TOKENS = 8, 10000.0, 20
CASES: dict[str, dict[str, Any]] = {  # of LoraConfig
    "all linear maps": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "q and v": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rank-stabilised, with patterns": {
        "r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "down_proj", "up_proj"],
        "rank_pattern": {"down_proj": 4, "layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"up_proj": 3},
    },
    "one layer": {"r": 8, "lora_alpha": 16, "target_modules": ["o_proj"], "layers_to_transform": [1]},
    "a regular expression": {"r": 8, "lora_alpha": 16, "target_modules": r".*\.(k_proj|gate_proj)"},
    "embedding and head whole": {
        "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"],
    },
}  # fmt: skip
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}  # of the run
ANSWERS, ANSWER_TOKENS = 6, 24
BOUNDS = {"fp64": 1e-10, "loss": 1e-4, "qlora": 1e-3, "logits": 1e-5}


class Peer:
    """The interpreter that has PEFT, transformers and llama.cpp."""

    def __init__(self, python: Path, folder: Path) -> None:
        self.python, self.folder = python, folder

    def run(self, action: str, jobs: Sequence[dict[str, Any]]) -> None:
        """Do the jobs of one action of scripts.parity.peft_peer in one process."""
        path = self.folder / f"{action}.json"
        path.write_text(json.dumps(jobs))
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        command = [str(self.python), "-m", "scripts.parity.peft_peer", action, str(path)]
        subprocess.run(command, check=True, env=environment)

    def read_versions(self) -> dict[str, str]:
        """Return the version of each of PACKAGES."""
        names = [package.partition(">")[0] for package in PACKAGES]
        code = (
            f"import importlib.metadata, json\nprint(json.dumps({{n: importlib.metadata.version(n) for n in {names}}}))"
        )
        return json.loads(subprocess.run([self.python, "-c", code], check=True, capture_output=True, text=True).stdout)


# ---- gradients in fp64 ----------------------------------------------------------------------------------------------


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference of two tensors' elements, as a share of b's largest."""
    return float((a - b).abs().max() / b.abs().max())


def write_given(folder: Path) -> torch.Tensor:
    """Write the tokens of a case and RoPE's table, which is in fp32 in every program. Return the tokens."""
    folder.mkdir(parents=True)
    tokens = torch.randint(SHAPE["vocab_size"], (TOKENS,), generator=torch.Generator().manual_seed(1))
    cos, sin = kernels.rope_cos_sin(torch.arange(TOKENS), kernels.rope_frequencies(HEAD_DIM, THETA))
    save_file({"tokens": tokens, "cos": cos, "sin": sin}, folder / "given.safetensors")
    return tokens


def compare_case(folder: Path, tokens: torch.Tensor) -> dict[str, float]:
    """Compute what PEFT computed of a case; return the largest differences. Write the adapter anew, as folder/ours."""
    theirs = load_file(folder / "results.safetensors")
    source = open_source(folder / "base")
    adapter = open_adapter(folder / "theirs", source.config)
    model = new_model(source.config, "cpu", torch.float64, "ref", adapter=adapter.config)
    source.read_into(model)
    adapter.read_into(model)
    logits = model.logits(model(tokens))
    loss = F.cross_entropy(logits[:-1], tokens[1:])
    loss.backward()
    loss = loss.detach()
    trained, gradients = model.trained_parameters(), []
    pieces = list_factors(source.config, adapter.config)
    for name, piece in pieces.items():
        ours = piece.rows_of({piece.parameter: trained[piece.parameter].grad})
        gradients.append(largest_difference(ours, theirs[name]))
    if theirs.keys() - {"loss", "logits"} != pieces.keys():
        raise AssertionError(f"{folder}: PEFT trains {len(theirs) - 2} tensors, we {len(pieces)}")
    save_adapter(folder / "ours", model, str(folder / "base"))
    merged = new_model(source.config, "cpu", torch.float64, "ref")
    MergedSource(source, adapter).read_into(merged)
    with torch.no_grad():
        of_merged = merged.logits(merged(tokens))
    return {
        "loss": abs(float(loss) / float(theirs["loss"]) - 1), "gradient": max(gradients),
        "logits": largest_difference(logits.detach(), theirs["logits"]),
        "merged_logits": largest_difference(of_merged, theirs["logits"]),
    }  # fmt: skip


def compare_gradients(peer: Peer, folder: Path) -> dict[str, dict[str, float]]:
    """Return the largest relative differences of each case: loss, gradient, logits, of the merge, and back in PEFT."""
    folders = {case: folder / f"case-{i}" for i, case in enumerate(CASES)}
    jobs = []
    for seed, (case, path) in enumerate(folders.items()):
        tokens = write_given(path)
        shape = SHAPE | {"tie_word_embeddings": "modules_to_save" not in CASES[case]}
        jobs.append({"folder": str(path), "shape": shape, "lora": CASES[case], "seed": seed})
    peer.run("make_case", jobs)
    found = {case: compare_case(path, tokens) for case, path in folders.items()}
    peer.run("compute_logits", [
        {"base": str(path / "base"), "adapter": str(path / "ours"), "tokens": tokens.tolist(), "dtype": "float64",
         "table": str(path / "given.safetensors"), "out": str(path / "back.safetensors")}
        for path in folders.values()
    ])  # fmt: skip
    for case, path in folders.items():
        back, theirs = (load_file(path / f"{name}.safetensors")["logits"] for name in ("back", "results"))
        found[case]["logits_back_in_peft"] = largest_difference(back, theirs)
        print(f"{case}: " + ", ".join(f"{name} {value:.1e}" for name, value in found[case].items()))
    return found


# ---- a run, the adapters of both, and the merged model --------------------------------------------------------------


@torch.no_grad()
def our_logits(model: Transformer, tokens: Sequence[int]) -> torch.Tensor:
    """Return the logits (T, V) of a text."""
    return model.logits(model(torch.tensor(tokens)))


def train_twice(
    peer: Peer, args: Namespace, base: Path, folder: Path, rows: list[dict[str, str]], kind: str
) -> dict[str, Any]:
    """Train an adapter that PEFT has made, by PEFT's loop and by engine.finetune. Return both curves' figures.

    kind: lora, or qlora, for which bitsandbytes keeps PEFT's base in 4 bits.
    """
    folder.mkdir(exist_ok=True)
    data = folder / "rows.json"
    data.write_text(json.dumps(rows))
    peer.run("train", [
        {"base": str(base), "nf4": kind == "qlora", "lora": LORA, "rows": str(data), "folder": str(folder),
         **describe_settings(args)}
    ])  # fmt: skip
    theirs = [tuple(step) for step in json.loads((folder / "curve.json").read_text())]
    ours = finetune_curve(
        args, folder / "out", "--model", base, "--adapter", kind, "--adapter-dir", folder / "initial", "--data", data,
        "--no-shuffle", "--device", "cpu", "--epochs", 1,
    )  # fmt: skip
    worst = worst_difference(ours, theirs)
    return {"loss": losses_of(ours), "peft_loss": losses_of(theirs), "worst_relative_difference": worst}


def cross_adapters(peer: Peer, folder: Path, tokens: list[int]) -> dict[str, float]:
    """Return the largest relative difference of logits, fp32, for an adapter of ours in PEFT and one of PEFT's here."""
    base, found = folder / "base", {}
    adapters = {"ours_in_peft": folder / "out", "pefts_here": folder / "trained"}
    peer.run("compute_logits", [
        {"base": str(base), "adapter": str(path), "tokens": tokens, "dtype": "float32",
         "out": str(folder / f"{name}.safetensors")}
        for name, path in adapters.items()
    ])  # fmt: skip
    for name, path in adapters.items():
        model, *_ = load_adapter_beside(base, path)
        theirs = load_file(folder / f"{name}.safetensors")["logits"]
        found[name] = largest_difference(our_logits(model, tokens), theirs)
    return found


def load_adapter_beside(base: Path, folder: Path) -> tuple[Transformer, Tokenizer]:
    """Return the base with an adapter beside its weights, in fp32, and the tokenizer."""
    source = open_source(base)
    adapter = open_adapter(folder, source.config)
    model = new_model(source.config, "cpu", DTYPES["fp32"], "ref", adapter=adapter.config)
    source.read_into(model)
    adapter.read_into(model)
    return model, load_model(str(base), torch.device("cpu"), DTYPES["fp32"], "ref")[1]


def compare_merged(peer: Peer, folder: Path, rows: list[dict[str, str]]) -> dict[str, Any]:
    """Export the merged model; return how many greedy answers are those of the adapter beside its base."""
    merged, gguf = folder / "merged", folder / "merged.gguf"
    merge = ("engine.export", "--model", folder / "base", "--adapter-dir", folder / "out", "--merge")
    run_module(*merge, "--out", merged)
    run_module(*merge, "--out", gguf, "--layout", "gguf", "--gguf-type", "f32")
    model, tokenizer = load_adapter_beside(folder / "base", folder / "out")
    prompts = [tokenizer.encode(make_prompt(row)) for row in rows[:ANSWERS]]
    stops = tokenizer.stop_ids
    ours = generate(model, prompts, stops, ANSWER_TOKENS)
    job = {"base": str(merged), "gguf": str(gguf), "prompts": prompts, "tokens": ANSWER_TOKENS}
    found: dict[str, Any] = {"answers": len(prompts), "first_answer": tokenizer.decode(ours[0])}
    for action, name in (("answer", "transformers"), ("answer_by_llama_cpp", "llama_cpp")):
        out = folder / f"{action}-answers.json"
        peer.run(action, [job | {"out": str(out)}])
        pairs = zip(ours, json.loads(out.read_text()), strict=True)
        texts = [[tokenizer.decode(cut_at_stop(ids, stops)) for ids in pair] for pair in pairs]
        found[f"same_in_{name}"] = sum(a == b for a, b in texts)
    of_merged = load_model(str(merged), torch.device("cpu"), DTYPES["fp32"], "ref")[0]
    found["merged_logits"] = largest_difference(our_logits(of_merged, prompts[0]), our_logits(model, prompts[0]))
    return found


def make_prompt(row: dict[str, str]) -> str:
    """Return a row's prompt in Alpaca's template."""
    return (ALPACA_INPUT if row["input"] else ALPACA_NO_INPUT).format(**row)


def read_short_rows(args: Namespace, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """Return the first rows of --data that --max-length does not cut: one that loses its answer has no loss.

    Raise SystemExit where they are too few.
    """
    found = []
    for row in map(row_as_dict, read_rows([Path(args.data)])[0]):
        if len(tokenizer.encode(make_prompt(row) + row["output"])) < args.max_length:
            found.append(row)
    if len(found) < args.steps * args.batch:
        raise SystemExit(
            f"--data {args.data}: {len(found)} rows are under --max-length; {args.steps * args.batch} wanted"
        )
    return found[: args.steps * args.batch]


def cut_at_stop(ids: Sequence[int], stops: frozenset[int] | set[int]) -> list[int]:
    """Return ids before the first that ends an answer."""
    return list(ids[: next((i for i, id in enumerate(ids) if id in stops), len(ids))])


def find_excesses(result: dict[str, Any]) -> list[str]:
    """Return what is over its bound, one line each."""
    figures = {
        f"{case}, {name}": (value, BOUNDS["fp64"]) for case, of in result["fp64"].items() for name, value in of.items()
    }
    figures["a step's loss"] = result["curve"]["worst_relative_difference"]["loss"], BOUNDS["loss"]
    figures["a QLoRA step's loss"] = result["qlora"]["worst_relative_difference"]["loss"], BOUNDS["qlora"]
    figures |= {name: (value, BOUNDS["logits"]) for name, value in result["crossed"].items()}
    figures["merged logits"] = result["merged"]["merged_logits"], BOUNDS["logits"]
    over = [f"{name} is {value:.1e} off, wanted {bound}" for name, (value, bound) in figures.items() if value > bound]
    for name in ("transformers", "llama_cpp"):
        same, n = result["merged"][f"same_in_{name}"], result["merged"]["answers"]
        over += [f"{name} gives {same} of {n} answers"] if same < n else []
    return over


def main() -> int:
    """Run the comparisons, write the figures, and print what is over its bound."""
    parser = new_curve_parser(__doc__, steps=20, batch=2, max_length=128, lr=2e-4)
    parser.add_argument("--data", required=True, help="Alpaca JSON or JSONL")
    parser.add_argument("--model", default="smollm2-135m", help="of the run (default: %(default)s)")
    parser.add_argument("--python", type=Path, help="an interpreter that has " + ", ".join(PACKAGES))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        python = args.python or make_environment(folder / "environment", PACKAGES)[0] / "python"
        peer = Peer(python, folder)
        fp64 = compare_gradients(peer, folder)
        run_module("engine.export", "--model", args.model, "--out", folder / "base", "--dtype", "fp32")
        tokenizer = load_model(str(folder / "base"), torch.device("cpu"), DTYPES["fp32"], "ref")[1]
        rows = read_short_rows(args, tokenizer)
        curve = train_twice(peer, args, folder / "base", folder, rows, "lora")
        in_4_bits = train_twice(peer, args, folder / "base", folder / "qlora", rows, "qlora")
        crossed = cross_adapters(peer, folder, tokenizer.encode(rows[0]["output"] * 8)[:100])
        merged = compare_merged(peer, folder, rows)
    result = {
        "what": "LoRA against PEFT: fp64 gradients, a curve, adapters both ways, merged models",
        "model": args.model, "data": Path(args.data).name, **describe_settings(args), "lora": LORA,
        "date": today(), **peer.read_versions(), "fp64": fp64, "curve": curve, "qlora": in_4_bits,
        "crossed": crossed, "merged": merged,
    }  # fmt: skip
    write_json(args.json, result)
    print(f"losses differ by {curve['worst_relative_difference']['loss']:.1e} at most; logits {crossed}; {merged}")
    over = find_excesses(result)
    print("\n".join(over), file=sys.stderr)
    return int(bool(over))


if __name__ == "__main__":
    run_command(main)
