"""The section of docs/measurements.md on LoRA against PEFT."""

from typing import Any

from scripts.pages.without_gpu import paragraph

NAMES = {
    "loss": "loss", "gradient": "gradients", "logits": "logits", "merged_logits": "logits, merged",
    "logits_back_in_peft": "logits, written by us, in PEFT",
}  # fmt: skip


def adapters(figures: dict[str, Any]) -> list[str]:
    """Return the paragraphs and the tables."""
    worst, crossed, merged = figures["curve"]["worst_relative_difference"], figures["crossed"], figures["merged"]
    first, in_4_bits = next(iter(figures["fp64"].values())), figures["qlora"]["worst_relative_difference"]
    return [
        paragraph(
            "A small LLaMA with an adapter that PEFT made, all in fp64: loss, gradients and logits here against PEFT's "
            "on transformers, then the adapter written by us, read by PEFT. Largest relative differences."
        ),
        "",
        "| | " + " | ".join(NAMES[name] for name in first) + " |",
        "|---|" + "---|" * len(first),
        *(
            f"| {case} | " + " | ".join(f"{value:.1e}" for value in of.values()) + " |"
            for case, of in figures["fp64"].items()
        ),
        "",
        paragraph(
            f"Then {figures['model']} in fp32, {figures['steps']} steps of {figures['batch']} rows: `engine.finetune "
            "--adapter lora` and a loop of PEFT, transformers and torch's AdamW, from the same first adapter (all "
            f"linear maps, rank {figures['lora']['r']}). A step's loss differs by {worst['loss']:.1e} at most, its "
            f"gradient norm by {worst['grad_norm']:.1e}. The adapter trained here gives PEFT logits that are "
            f"{crossed['ours_in_peft']:.1e} off, PEFT's gives them here {crossed['pefts_here']:.1e} off. The merged "
            "model, exported in fp32, gives the same greedy answers as the adapter beside its base to "
            f"{merged['same_in_transformers']} of {merged['answers']} prompts in transformers and to "
            f"{merged['same_in_llama_cpp']} of {merged['answers']} in llama.cpp."
        ),
        "",
        paragraph(
            "The same with the frozen maps in 4 bits, `--adapter qlora` against PEFT on bitsandbytes' NF4 with double "
            f"quantisation: a step's loss differs by {in_4_bits['loss']:.1e} at most, its gradient norm by "
            f"{in_4_bits['grad_norm']:.1e}."
        ),
    ]  # fmt: skip


def adapters_row(figures: dict[str, Any]) -> tuple[str, str, str, str]:
    """Return README's cells."""
    curve = figures["curve"]
    ours, theirs = (f"{losses[0]:.4f} to {losses[-1]:.4f}" for losses in (curve["loss"], curve["peft_loss"]))
    worst = curve["worst_relative_difference"]["loss"]
    what = f"LoRA's loss over {figures['steps']} steps, {figures['model']} in fp32"
    return what, ours, f"{theirs} (PEFT)", f"{worst:.1e} apart at most"


def cpu_adapter(figures: dict[str, Any]) -> list[str]:
    """Return the paragraph and the table of LoRA steps on a CPU."""
    labels = {
        "lora": "ours, `--adapter lora`", "all weights": "ours, all weights",
        "peft": f"PEFT and transformers, its best micro-batch of {figures['settings']['peft']['micro']} rows",
    }  # fmt: skip

    def line(name: str) -> str:
        ratio, gb = figures["ratio"].get(name), figures["peak_bytes"][name] / 1e9
        times = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else ""
        dtype, rate = figures["settings"][name]["dtype"], figures["tokens_per_s"][name]
        return f"| {labels[name]} | {dtype} | {rate:.0f} | {times} | {gb:.2f} |"

    return [
        paragraph(
            f"SmolLM2-135M takes steps of {figures['batch']} rows with the lengths of Alpaca's on {figures['cores']} "
            f"cores: updates of rank {figures['rank']} on all linear maps, by us and by PEFT {figures['peft']} on "
            f"transformers {figures['transformers']}, and all weights by us. Each at its best dtype, thread count and "
            "micro-batch; all in turn. The last column is the peak memory of the process."
        ),
        "",
        "| | dtype | tokens/s | LoRA is faster by | GB |",
        "|---|---|---|---|---|",
        *map(line, labels),
    ]


def cpu_adapter_row(figures: dict[str, Any]) -> tuple[str, str, str, str]:
    """Return README's cells."""
    rates, ratio = figures["tokens_per_s"], figures["ratio"]["peft"]
    what = f"LoRA of SmolLM2-135M on {figures['cores']} CPU cores, tokens/s"
    times = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
    return what, f"{rates['lora']:.0f}", f"{rates['peft']:.0f} (PEFT)", times
