"""Writes README's figures from benchmarks/*.json, so that no number there is typed by hand.

python -m scripts.pages.benchmarks            writes them
python -m scripts.pages.benchmarks --check    exits 1 when README says something else
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
START, END = "<!-- figures: made by scripts/pages/benchmarks.py -->\n", "<!-- /figures -->"


def parity(figures):
    worst = max(d["loss"] for d in figures["worst_relative_difference"].values())
    sizes = ", ".join(figures["worst_relative_difference"])
    return (
        f"| same maths: SmolLM2-135M, fp32, {figures['steps']} steps of {figures['batch']} Alpaca rows, micro-batches "
        f"of {sizes}: worst relative difference of a step's loss from transformers | {worst:.1e} |"
    )


def kernel_parity(figures):
    worst, losses = figures["worst_relative_difference"]["loss"], figures["loss"]["references"]
    return (
        f"| every op a kernel against every op a reference ({figures['device']}): a small LLaMA in fp32, "
        f"{figures['steps']} steps, loss {losses[0]:.2f} to {losses[-1]:.2f}: "
        f"worst relative difference of a step's loss | {worst:.1e} |"
    )


def optimizer_parity(figures):
    final, apart = figures["final_loss"], figures["final_relative_difference"]["8bit"]
    return (
        f"| 8-bit optimizer states against fp32: SmolLM2-135M, fp32, {figures['steps']} steps of {figures['batch']} "
        f"Alpaca rows, loss at the end {final['8bit']:.4f} against {final['fp32']:.4f} | {100 * apart:.3f}% apart |"
    )


def static(figures):
    records = figures["records"]
    chips = sorted({r["chip"] for r in records}, key=lambda chip: int(chip.removeprefix("sm_")))
    versions = sorted({r["triton"] for r in records})
    return (
        f"| every launch that ships compiled for {', '.join(chips)} under Triton {' and '.join(versions)}: "
        f"{len(records)} compilations | {sum(r['spills'] for r in records)} spills |"
    )


def accumulation(figures):
    row = next(f for f in figures["figures"] if f["micro_batches"] == 8)
    return (
        f"| gradients of {row['micro_batches']} micro-batches added up in bf16 in the GEMMs: relative error against "
        "fp32 sums, beside what bf16 training is off by itself | "
        f"{row['bf16 in the epilogue']:.1e} beside {row['bf16 itself']:.1e} |"
    )


def data_speed(figures):
    start, mix = figures["start"], figures["alpaca_lengths"]
    packed = next(epoch for epoch in mix["epochs"] if epoch["max_tokens"] == 8320)
    return (
        f"| data ({figures['cores']} cores): {start['rows']:,} rows of {start['tokens_a_row']:.0f} tokens read and "
        f"tokenised; the second start, cached | {start['first_start_s']['median']:.1f} s "
        f"({start['first_start_rows_per_s']:,.0f} rows/s); {start['cached_start_s']['median']:.2f} s |\n"
        f"| Alpaca's lengths, 128 rows a step, micro-batches of at most {packed['max_tokens']:,} tokens: tokens "
        f"computed of those that the rows hold, with shared prefixes; padding | {packed['computed_over_logical']:.1%}; "
        f"{packed['padding']:.2%} |"
    )


def cpu_speed(figures):
    rates, settings = figures["tokens_per_s"], figures["settings"]

    def against(name):
        ratio = figures["ratio"][name]
        return f"{rates[name]:.0f}: {ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f})"

    return (
        f"| CPU ({figures['cores']} cores, {figures['cpu']}): SmolLM2-135M in {settings['cria']['dtype']}, rows of "
        f"Alpaca's lengths, real tokens/s: ours; the transformers loop with padded micro-batches of "
        f"{settings['transformers, padded']['micro']} rows; with its best, {settings['transformers']['micro']} | "
        f"{rates['cria']:.0f}; {against('transformers, padded')}; {against('transformers')} |"
    )


def dedup(figures):
    stream, pairs = figures["stream"], figures["all_pairs"]
    ratio = pairs["ratio"]
    assert pairs["same_decisions"]
    return (
        f"| exact ROUGE-L de-duplication, one thread: {stream['texts']:,} texts, {stream['kept']:,} kept, seconds of "
        f"CPU; {pairs['texts']:,} texts: all pairs by rapidfuzz take, of the same decisions | "
        f"{stream['cpu_s']['median']:.1f} s; {ratio['median']:.1f}x ({ratio['min']:.1f} to {ratio['max']:.1f}) |"
    )


def data_gen(figures):
    run, killed, batches = (figures["runs"][name] for name in ("unbroken", "killed", "batches"))
    counts, cpu = run["counts"], figures["replay_cpu_s"]
    assert figures["identical"]
    return (
        f"| {counts['kept']:,} rows from a test server ({figures['server']['latency_s']:g} s an answer, "
        f"{counts['attempts'] - counts['answers'] - counts['failed_requests']:,} failures), {figures['cores']} cores "
        f"shared with it: requests; wall time; CPU, of which de-duplication; memory | {counts['requests']:,}; "
        f"{run['wall_s']:.0f} s; {run['cpu_s']:.0f} s, {cpu['de-duplication']:.1f} s; "
        f"{run['peak_memory_bytes'] / 1e6:,.0f} MB |\n"
        f"| the same, killed {killed['kills']} times at random, and in batches: the dataset; recorded requests sent "
        f"again; simulated dollars, of a batch run | identical; {killed['recorded_and_sent_again']}; "
        f"${run['cost']['spent_usd']:.2f}, ${batches['cost']['spent_usd']:.2f} |"
    )


# ---- reports of scripts.gpu_report ----------------------------------------------------------------------------------


def gpu_reports(folder):
    """Every report of a GPU in a folder; what --smoke wrote is none."""
    found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    return [r for r in found if r.get("what") == "scripts.gpu_report" and not r["smoke"]]


def figure(parts, row):
    """What a report measured of one row of targets.json: a number, "wrong result", "failed", or None."""
    records = parts.get(row.get("part", "kernels"), {}).get("records", [])
    if "name" in row:
        mine = [r for r in records if r["name"] == row["name"]]
        if any("failed" in r for r in mine):
            return "failed"
        return next((r[row["figure"]] for r in mine if row["figure"] in r), None)
    mine = [
        r
        for r in records
        if r["op"] == row["op"]
        and r["shape"] == row.get("shape", r["shape"])
        and r.get("pass") in (None, row.get("pass", r.get("pass")))
    ]
    ours = [r for r in mine if r["who"] == row.get("who", "ours")]
    if any("wrong" in r for r in ours):
        return "wrong result"
    if any("failed" in r for r in ours):
        return "failed"
    if row["figure"] == "best_peer":
        values = [r["times_ours"] for r in mine if r["who"] not in ("ours", "torch eager") and "times_ours" in r]
    else:
        values = [r[row["figure"]] for r in ours if row["figure"] in r]
    if not values:
        return None
    # The least favourable of what the row selects; of peers the fastest is that too.
    return min(values) if "at_least" in row else max(values)


def gpu_row(parts, row):
    value = figure(parts, row)
    goal = row.get("at_least", row.get("at_most"))
    target = f"{'≥' if 'at_least' in row else '≤'} {goal:,g}"
    if not isinstance(value, float | int):
        return f"| {row['what']} | {value or 'not measured'} | {target} |"
    met = value >= row["at_least"] if "at_least" in row else value <= row["at_most"]
    measured = f"{value:,.0f}" if value >= 100 or isinstance(value, int) else f"{value:.2f}"
    return f"| {row['what']} | {f'**{measured}**' if met else measured} | {target} |"


def gpu(report, targets):
    """A table of one report, the targets beside its figures; bold where a target is reached."""
    parts = report["parts"]
    facts, ceilings, tests = (parts.get(name, {}) for name in ("machine", "ceilings", "tests"))
    about = [
        facts.get("device", "GPU"), f"driver {facts.get('driver')}", f"torch {facts.get('torch')}",
        f"triton {facts.get('triton')}", f"commit {(report.get('commit') or 'unknown')[:12]}", report.get("date", ""),
    ]  # fmt: skip
    lines = [f"| {', '.join(about)} | measured | target on one {targets['device']} |", "|---|---|---|"]
    if "copy_gb_per_s" in ceilings:
        rates = f"{ceilings['copy_gb_per_s']:,.0f} GB/s, {ceilings['gemm_tflops']:,.0f} TFLOP/s"
        lines.append(f"| device copy; bf16 GEMM of {ceilings['gemm_side']} cubed | {rates} | |")
    files = [figures for figures in tests.values() if isinstance(figures, dict)]
    if files:
        passed, failed, skipped = (sum(f[word] for f in files) for word in ("passed", "failed", "skipped"))
        cut = sum("ended" in f for f in files)
        told = f"{passed} passed, {failed} failed, {skipped} skipped" + f"; {cut} files did not finish" * bool(cut)
        lines.append(f"| kernel tests on the device | {told} | none failed |")
    return [*lines, *(gpu_row(parts, row) for row in targets["rows"]), *gpu_steps(parts)]


def gpu_steps(parts):
    """What a report tells of whole steps beside its targets: MFU, the whole run, where the time goes, peers."""
    steps, profiles, peers = (parts.get(name, {}).get("records", []) for name in ("step", "profile", "peers"))
    lines = []
    for r in steps:
        if r.get("mfu") is not None:
            figures = f"{r['tokens_per_s']:,.0f} tokens/s, {r['mfu']:.1%}, {r['peak_gib']:.1f} GiB"
            lines.append(f"| step, {r['name']}: MFU = {r['mfu_formula']} | {figures} | |")
    for p in parts.get("step", {}).get("projections", []):
        price = f", ${p['dollars']:.2f} at ${p['dollars_an_hour']} an hour ({p['price_of']})" if p["dollars"] else ""
        lines.append(f"| {p['what']} ({p['of']}): {p['steps']:,} steps | {p['minutes']:.1f} minutes{price} | |")
    for r in profiles:
        if "kinds" in r:
            kinds = sorted(r["kinds"].items(), key=lambda item: -item[1]["share"])
            told = ", ".join(f"{kind} {part['share']:.1%}" for kind, part in kinds if part["share"] >= 0.001)
            lines.append(f"| where a step of {r['name']} goes: {r['launches']:,} launches | {told} | |")
    for r in peers:
        if "ours_over_peer" in r:
            without = r.get("ours_without_sharing_over_peer")
            ratio = f"; ours is {r['ours_over_peer']:.2f}x" + (f", {without:.2f}x without sharing" if without else "")
            memory = "" if r["peak_gib"] is None else f", {r['peak_gib']:.1f} GiB"
            lines.append(f"| {r['name']} | {r['tokens_per_s']:,.0f} tokens/s{memory}{ratio} | |")
    return [*lines, *filter(None, map(gpu_ranks, parts.get("ranks", {}).get("records", [])))]


def gpu_ranks(r):
    """What a record of FSDP2's cost, of saves, or of a check tells beside its target."""
    if "over_plain" in r:
        memory = "" if r["peak_gib"] is None else f"; {r['peak_gib']:.1f} GiB, plain {r['plain_peak_gib']:.1f} GiB"
        figures = f"{r['over_plain']:.3f}x ({r['over_plain_min']:.3f} to {r['over_plain_max']:.3f}){memory}"
        master = f", master {r['master']}" if "out_of_memory" in r else ""
        return f"| FSDP2 over the plain step, {r['name']}{master}: {r['pairs']} pairs of blocks | {figures} | |"
    if "saves" in r:
        slow = r["meanwhile_over_unsaved"]
        meanwhile = f"steps meanwhile {slow:.3f}x" if slow else "no step meanwhile"
        return (
            f"| {r['name']}: {r['bytes'] / 1e9:.1f} GB to {r['folder'].split('(')[-1].rstrip(')')} | "
            f"{r['write_s']:.1f} s, {r['gb_per_s']:.2f} GB/s; held {r['held_s']:.3f} s, the first "
            f"{r['first_held_s']:.3f} s; {meanwhile}; the run {r['over_unsaved_at_100']:.4f}x at --save-every 100 | |"
        )
    if "largest_loss_apart" in r:
        return f"| {r['name']} ({r['backend']}): losses apart at most | {r['largest_loss_apart']:.1e} | |"
    reason = next((r[word] for word in ("absent", "failed") if word in r), None)
    return reason and f"| {r['name']} | {reason} | |"


def rendered(folder=ROOT / "benchmarks"):
    lines = ["", "| measured | |", "|---|---|"]
    for render in (
        parity,
        kernel_parity,
        optimizer_parity,
        accumulation,
        static,
        dedup,
        data_gen,
        data_speed,
        cpu_speed,
    ):
        path = folder / f"{render.__name__}.json"
        if path.exists():
            lines.append(render(json.loads(path.read_text())))
    reports = gpu_reports(folder)
    if not reports:
        lines.append("| GPU | not yet measured |")
    else:
        targets = json.loads((ROOT / "benchmarks" / "targets.json").read_text())
        for report in reports:
            lines += ["", *gpu(report, targets)]
    return "\n".join([*lines, "", ""])


def main():
    readme = (ROOT / "README.md").read_text()
    before, rest = readme.split(START)
    new = before + START + rendered() + END + rest.split(END, 1)[1]
    if "--check" in sys.argv:
        if new != readme:
            sys.exit(
                "README.md: its figures are not those of benchmarks/*.json; run python -m scripts.pages.benchmarks"
            )
        return
    (ROOT / "README.md").write_text(new)


if __name__ == "__main__":
    main()
