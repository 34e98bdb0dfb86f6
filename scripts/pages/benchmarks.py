"""Writes the figures of README and of docs/measurements.md from benchmarks/*.json, so that none is typed by hand.

python -m scripts.pages.benchmarks            writes both
python -m scripts.pages.benchmarks --check    exits 1 when one of them says something else
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_gen.base.cli import run_for_reader
from scripts.pages.adapters import adapters, adapters_row, cpu_adapter, cpu_adapter_row
from scripts.pages.cpu_adamw import cpu_adamw, offloaded
from scripts.pages.cpu_weight_gradient import cpu_weight_gradient
from scripts.pages.data import data_gen, data_servers, data_speed, dedup, dedup_row
from scripts.pages.decoding import decoding, decoding_row, spread
from scripts.pages.demo import demo, demo_adapters, demo_row
from scripts.pages.gpu_table import format_report, format_targets, read_reports
from scripts.pages.nf4 import nf4
from scripts.pages.serving import clients, crowd, lm_eval, serving, serving_row
from scripts.pages.tokenizer_ids import tokenizer_ids
from scripts.pages.without_gpu import paragraph, simulated, static, step_launches

ROOT = Path(__file__).parents[2]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "measurements.md"
START, END = "<!-- figures: made by scripts/pages/benchmarks.py -->\n", "<!-- /figures -->"
HEAD = """\
# Measurements

Made by `python -m scripts.pages.benchmarks` from `benchmarks/*.json`; do not edit. Each section says what was measured,
how, by which command and on which machine. `alpaca.json` in a command stands for any file of Alpaca rows; the files
behind these figures record which one was used. A range in brackets is the least and the most of repeated measurements.
"""
MACHINE = (  # what a file may say about where it was measured
    "cpu", "cores", "python", "torch", "triton", "transformers", "openai", "rapidfuzz", "numpy",
    "sentencepiece", "tokenizers", "llama_cpp_python", "peft", "xllamacpp", "bitsandbytes",
)  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """One section of the page, and the line of README's table that links to it.

    figures  the file in benchmarks/
    about    (figures) -> the paragraphs and the table
    row      (figures) -> README's cells: what, ours, peer, ratio; None: README has no line for it
    """

    figures: str
    title: str
    command: str
    about: Callable[[dict], list[str]]
    row: Callable[[dict], tuple[str, str, str, str]] | None = None

    @property
    def anchor(self) -> str:
        """Return the heading's anchor on GitHub."""
        kept = "".join(c for c in self.title.lower() if c.isalnum() or c in " -")
        return kept.replace(" ", "-")


def machine(figures: dict) -> list[str]:
    """Return the line that says when, on what and with which versions a file's figures were measured."""
    if "date" not in figures:
        return []
    facts = ", ".join(f"{name} {figures[name]}" for name in MACHINE if name in figures)
    return [paragraph(f"Measured on {figures['date']}: {facts}."), ""]


# ---- the loss curve -------------------------------------------------------------------------------------------------


def worst_loss(figures):
    return max(d["loss"] for d in figures["worst_relative_difference"].values())


def parity(figures):
    worst = figures["worst_relative_difference"]
    return [
        paragraph(
            "SmolLM2-135M is fine-tuned twice in fp32 on a CPU: by a plain `transformers` loop with padded "
            f"batches, and by this engine with packed micro-batches. Both take the {figures['batch']} rows of a "
            f"step in the order of the file. A figure is the largest relative difference over {figures['steps']} "
            "steps; neighbouring fp32 numbers are 1.2e-07 apart."
        ),
        "",
        "| rows a micro-batch | loss | gradient norm |",
        "|---|---|---|",
        *(f"| {size} | {d['loss']:.1e} | {d['grad_norm']:.1e} |" for size, d in worst.items()),
    ]  # fmt: skip


def parity_row(figures):
    curves = figures["transformers_loss"], figures["loss"][min(figures["loss"], key=int)]
    theirs, ours = (f"{curve[0]:.4f} to {curve[-1]:.4f}" for curve in curves)
    what = f"loss over {figures['steps']} steps, SmolLM2-135M in fp32"
    return what, ours, f"{theirs} (transformers)", f"{worst_loss(figures):.1e} apart at most"


def kernel_parity(figures):
    worst, losses = figures["worst_relative_difference"], figures["loss"]["references"]
    return [
        paragraph(
            f"A small LLaMA is trained twice in fp32 for {figures['steps']} steps: every op through its Triton "
            f"kernel, and every op through its plain PyTorch reference. The kernels ran on: {figures['device']}. "
            "README's picture shows both curves."
        ),
        "",
        "| | |",
        "|---|---|",
        f"| loss, first step to last | {losses[0]:.2f} to {losses[-1]:.2f} |",
        f"| worst relative difference of a step's loss | {worst['loss']:.1e} |",
        f"| worst relative difference of a step's gradient norm | {worst['grad_norm']:.1e} |",
    ]


def kernel_parity_row(figures):
    ours, references = figures["loss"]["kernels"], figures["loss"]["references"]
    worst = figures["worst_relative_difference"]["loss"]
    what = f"loss over {figures['steps']} steps through our kernels (interpreted on a CPU)"
    forms = (f"{curve[0]:.2f} to {curve[-1]:.2f}" for curve in (ours, references))
    return what, next(forms), f"{next(forms)} (plain PyTorch)", f"{worst:.1e} apart at most"


def optimizer_parity(figures):
    final = figures["final_loss"]
    return [
        paragraph(
            f"SmolLM2-135M is fine-tuned twice in fp32 on a CPU, {figures['steps']} steps of {figures['batch']} "
            "rows, with AdamW's m and v kept in fp32 (8 bytes a parameter) and in blockwise 8 bits (2 bytes). The "
            "final loss is the mean over the last tenth of the steps."
        ),
        "",
        "| states | final loss |",
        "|---|---|",
        *(f"| {name} | {loss:.4f} |" for name, loss in final.items()),
        f"| relative difference | {figures['final_relative_difference']['8bit']:.1e} |",
    ]  # fmt: skip


def optimizer_parity_row(figures):
    final, apart = figures["final_loss"], figures["final_relative_difference"]["8bit"]
    what = f"loss after {figures['steps']} steps with 8-bit optimizer states"
    return what, f"{final['8bit']:.4f}", f"{final['fp32']:.4f} (fp32 states)", f"{100 * apart:.3f}% apart"


def accumulation(figures):
    return [
        paragraph(
            "Gradients of several micro-batches are added up in bf16 inside the matrix products. The table "
            "compares the error of such a sum with that of rounding first and adding then, as autograd does, and "
            "with what bf16 weights and activations alone are off by. Relative L2 norms over "
            f"{figures['matrices']} matrices of SmolLM2-135M, against fp32 sums."
        ),
        "",
        "| micro-batches | in the product | rounded, then added | bf16 itself |",
        "|---|---|---|---|",
        *(
            f"| {f['micro_batches']} | {f['bf16 in the epilogue']:.1e} | {f['bf16, rounded and added']:.1e} | "
            f"{f['bf16 itself']:.1e} |"
            for f in figures["figures"]
        ),
    ]


# ---- speed on a CPU -------------------------------------------------------------------------------------------------


def cpu_speed(figures):
    rates, ratio, settings = figures["tokens_per_s"], figures["ratio"], figures["settings"]
    torch_too = [name for name in rates if name.startswith("cria with")]

    def line(name, label):
        times = spread(ratio[name], ".2f") if name in ratio else ""
        return f"| {label} | {settings[name]['dtype']} | {settings[name]['threads']} | {rates[name]:.0f} | {times} |"

    return [
        paragraph(
            f"SmolLM2-135M takes steps of {figures['batch']} rows with the lengths of Alpaca's. A probe first "
            "finds the best dtype, thread count and micro-batch of each side; then all take equal steps in turn. "
            "Tokens are those that the rows hold: padding never counts, and a shared prefix counts in full."
        ),
        "",
        "| | dtype | threads | tokens/s | ours is faster by |",
        "|---|---|---|---|---|",
        line("cria", "ours"),
        *(line(name, "ours with torch's operators (`--kernels ref`)") for name in torch_too),
        line("transformers", f"transformers, its best micro-batch of {settings['transformers']['micro']} rows"),
        line("transformers, padded", f"transformers, {settings['transformers, padded']['micro']} padded rows"),
    ]  # fmt: skip


def cpu_speed_row(figures):
    rates, ratio = figures["tokens_per_s"], figures["ratio"]["transformers"]
    what = f"fine-tuning SmolLM2-135M on {figures['cores']} CPU cores, tokens/s"
    return what, f"{rates['cria']:.0f}", f"{rates['transformers']:.0f} (transformers)", f"{spread(ratio, '.2f')}"


def script(name: str, figures: str, data: str = "") -> str:
    """Return the command that measures a file of figures."""
    return f"python -m {name} {data + ' ' if data else ''}--json benchmarks/{figures}.json"


ALPACA = "--data alpaca.json"
CPU_FP32 = "scripts.speed.cpu_step", "cpu_speed_fp32", f"{ALPACA} --dtypes fp32 --rounds 3"
MEASUREMENTS = (
    Measurement(
        "parity", "The same loss as transformers",
        script("scripts.parity.loss_curve", "parity", ALPACA), parity, parity_row,
    ),
    Measurement(
        "adapters", "Adapters as PEFT has them",
        script("scripts.parity.adapters", "adapters", ALPACA), adapters, adapters_row,
    ),
    Measurement(
        "cpu_adapter", "An adapter's step on a CPU",
        script("scripts.speed.cpu_adapter", "cpu_adapter", ALPACA), cpu_adapter, cpu_adapter_row,
    ),
    Measurement(
        "kernel_parity", "Kernels against references",
        script("scripts.parity.kernel_curve", "kernel_parity"), kernel_parity, kernel_parity_row,
    ),
    Measurement(
        "optimizer_parity", "Optimizer states in 8 bits",
        script("scripts.parity.optimizer_states", "optimizer_parity", ALPACA), optimizer_parity, optimizer_parity_row,
    ),
    Measurement(
        "accumulation", "Gradients added up in bf16",
        script("scripts.parity.gradient_sums", "accumulation"), accumulation,
    ),
    Measurement(
        "demo", "The demo", "OMP_NUM_THREADS=1 " + script("scripts.speed.demo", "demo"), demo, demo_row,
    ),
    Measurement(
        "demo_adapter", "The demo with an adapter", script("scripts.speed.demo_adapter", "demo_adapter"), demo_adapters,
    ),
    Measurement("nf4", "NF4 with bitsandbytes' bits", script("scripts.parity.nf4", "nf4"), nf4),
    Measurement(
        "tokenizer_ids", "The same ids after export",
        script(
            "scripts.parity.tokenizer_ids", "tokenizer_ids",
            "FOLDERS GGUFS --rows alpaca.json --vectors INP_FILES --convert convert_hf_to_gguf.py"
        ), tokenizer_ids,
    ),
    Measurement(
        "cpu_speed", "Fine-tuning on a CPU",
        script("scripts.speed.cpu_step", "cpu_speed", ALPACA), cpu_speed, cpu_speed_row,
    ),
    Measurement(
        "cpu_speed_amx", "Fine-tuning on a CPU with AMX",
        script("scripts.speed.cpu_step", "cpu_speed_amx", f"{ALPACA} --dtypes bf16"), cpu_speed,
    ),
    Measurement("cpu_speed_fp32", "Fine-tuning on a CPU without bf16", script(*CPU_FP32), cpu_speed),
    Measurement(
        "cpu_weight_gradient", "The gradient of a weight on a CPU with AMX",
        script("scripts.speed.weight_gradient", "cpu_weight_gradient"), cpu_weight_gradient,
    ),
    Measurement("cpu_adamw", "AdamW on a CPU", script("scripts.speed.adamw", "cpu_adamw"), cpu_adamw),
    Measurement("offload", "Offloaded updates on a CPU", script("scripts.speed.offload", "offload"), offloaded),
    Measurement(
        "decoding", "Decoding on a CPU",
        script("scripts.speed.decoding", "decoding", "--gguf smollm2-bf16.gguf --tokens 32 --rounds 5"),
        decoding, decoding_row,
    ),
    Measurement(
        "serving", "Many requests at once",
        script("scripts.speed.serving", "serving", "--model smollm2-bf16 --peer NAME=COMMAND ..."),
        serving, serving_row,
    ),
    Measurement(
        "serving_clients", "Clients that people use", script("scripts.serving.clients", "serving_clients"), clients,
    ),
    Measurement("serving_crowd", "A crowd", script("scripts.serving.crowd", "serving_crowd"), crowd),
    Measurement(
        "lm_eval", "lm-eval on an exported folder",
        script("scripts.parity.lm_eval_harness", "lm_eval", "--model FOLDER"), lm_eval,
    ),
    Measurement(
        "dedup", "Exact de-duplication",
        "OMP_NUM_THREADS=1 " + script("scripts.speed.dedup", "dedup", "--rows alpaca.json"), dedup, dedup_row,
    ),
    Measurement(
        "data_gen", "A dataset from a server that fails", script("scripts.speed.data_gen", "data_gen"), data_gen,
    ),
    Measurement(
        "data_servers", "Datasets from real servers",
        script("scripts.serving.data_servers", "data_servers"), data_servers,
    ),
    Measurement(
        "data_speed", "Reading, tokenising and packing",
        script("scripts.speed.data", "data_speed", "--rows alpaca.json --tokenizer FOLDER"), data_speed,
    ),
    Measurement("static", "Machine code without a GPU", script("kernels.static", "static"), static),
    Measurement("simulated", "Kernels executed without a GPU", script("kernels.simulate", "simulated"), simulated),
    Measurement(
        "step_launches", "What a step launches",
        script("scripts.step.launches", "step_launches", "--tokens 16640 --instructions"), step_launches,
    ),
)  # fmt: skip


# ---- the two pages --------------------------------------------------------------------------------------------------


def read(folder: Path) -> list[tuple[Measurement, dict]]:
    """Return the measurements whose files are in the folder, each with its figures."""
    paths = ((m, folder / f"{m.figures}.json") for m in MEASUREMENTS)
    return [(m, json.loads(path.read_text())) for m, path in paths if path.exists()]


def rendered_page(folder: Path = ROOT / "benchmarks") -> str:
    """Return docs/measurements.md."""
    lines = [HEAD]
    for m, figures in read(folder):
        command = f"```sh\n{m.command}\n```"
        lines += [f"## {m.title}", "", *m.about(figures), "", command, "", *machine(figures)]
    lines += ["## On a GPU", ""]
    reports = read_reports(folder)
    targets = json.loads((ROOT / "benchmarks" / "targets.json").read_text())
    if not reports:
        lines += [
            "Not measured yet. Projections: [ranks.md](ranks.md) and `python -m engine.estimate`. The targets:",
            "",
        ]
        lines += format_targets(targets)
    else:
        for report in reports:
            lines += [*format_report(report, targets), ""]
        lines.append("```sh\npython -m scripts.gpu_report --out out/DEVICE --json benchmarks/DEVICE.json\n```")
    return "\n".join([*lines, ""])


def rendered_table(folder: Path = ROOT / "benchmarks") -> str:
    """Return README's table: what, ours, peer, ratio."""
    lines = ["", "| what | ours | peer | ratio |", "|---|---|---|---|"]
    for m, figures in read(folder):
        if m.row:
            what, ours, peer, ratio = m.row(figures)
            lines.append(f"| [{what}](docs/measurements.md#{m.anchor}) | {ours} | {peer} | {ratio} |")
    for report in read_reports(folder):
        device = report["parts"].get("machine", {}).get("device", "a GPU")
        for r in report["parts"].get("peers", {}).get("records", []):
            if "ours_over_peer" in r:
                ours, ratio = r["tokens_per_s"] * r["ours_over_peer"], r["ours_over_peer"]
                what = f"[{r['name']} on {device}, tokens/s](docs/measurements.md#on-a-gpu)"
                lines.append(f"| {what} | {ours:,.0f} | {r['tokens_per_s']:,.0f} | {ratio:.2f} |")
    if not read_reports(folder):
        lines.append("| [LLaMA-7B on a GPU](docs/measurements.md#on-a-gpu) | not yet measured | | |")
    return "\n".join([*lines, "", ""])


def main():
    readme = README.read_text()
    before, rest = readme.split(START)
    new = {README: before + START + rendered_table() + END + rest.split(END, 1)[1], PAGE: rendered_page()}
    if "--check" not in sys.argv:
        for path, text in new.items():
            path.write_text(text)
        return
    wrong = [path.name for path, text in new.items() if not path.exists() or path.read_text() != text]
    if wrong:
        sys.exit(f"{', '.join(wrong)}: not the figures of benchmarks/*.json; run python -m scripts.pages.benchmarks")


if __name__ == "__main__":
    sys.exit(run_for_reader(main))
