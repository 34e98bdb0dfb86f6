"""The tables that a report of scripts.gpu_report becomes: its figures beside the targets of benchmarks/targets.json."""

import json
from pathlib import Path

from scripts.base.results import format_mfu


def read_reports(folder):
    """Return every report of a GPU in a folder, without those that --smoke wrote."""
    found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    return [r for r in found if r.get("what") == "scripts.gpu_report" and not r["smoke"]]


def find_card(device: str, targets: dict) -> str:
    """Return the card of targets.json that a device is, or the first one for a device that is none of them."""
    return next((card for card in targets["cards"] if card in device), targets["cards"][0])


def rows_for_card(card: str, targets: dict) -> list[dict]:
    """Return the targets that hold for a card."""
    return [row for row in targets["rows"] if row.get("card", card) == card]


def format_goal(row: dict) -> str:
    """Return the target of a row."""
    return f"{'≥' if 'at_least' in row else '≤'} {row.get('at_least', row.get('at_most')):,g}"


def format_targets(targets: dict) -> list[str]:
    """Return the lines of a table of all targets, by card, beside which nothing has been measured yet."""
    cards = targets["cards"]
    lines = [f"| target on one | {' | '.join(cards)} |", f"|---|{'---|' * len(cards)}"]
    for row in targets["rows"]:
        goals = [format_goal(row) if row in rows_for_card(card, targets) else "" for card in cards]
        lines.append(f"| {row['what']} | {' | '.join(goals)} |")
    return lines


def find_figure(parts, row):
    """Return the figure of a report for one row of targets.json: a number, "wrong result", "failed", or None."""
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
    # Several records may match a row: the least favourable counts, which among peers is the fastest one.
    return min(values) if "at_least" in row else max(values)


def format_target(parts, row):
    """Return the line of one target: the figure measured, bold where the target is reached, and the target."""
    value = find_figure(parts, row)
    target = format_goal(row)
    if not isinstance(value, float | int):
        return f"| {row['what']} | {value or 'not measured'} | {target} |"
    met = value >= row["at_least"] if "at_least" in row else value <= row["at_most"]
    measured = f"{value:,.0f}" if value >= 100 or isinstance(value, int) else f"{value:.2f}"
    return f"| {row['what']} | {f'**{measured}**' if met else measured} | {target} |"


def format_report(report, targets):
    """Return the lines of the table of one report, with the targets beside its figures."""
    parts = report["parts"]
    facts, ceilings, tests = (parts.get(name, {}) for name in ("machine", "ceilings", "tests"))
    about = [
        facts.get("device", "GPU"), f"driver {facts.get('driver')}", f"torch {facts.get('torch')}",
        f"triton {facts.get('triton')}", f"commit {(report.get('commit') or 'unknown')[:12]}", report.get("date", ""),
    ]  # fmt: skip
    card = find_card(facts.get("device", ""), targets)
    lines = [f"| {', '.join(about)} | measured | target on one {card} |", "|---|---|---|"]
    if "copy_gb_per_s" in ceilings:
        rates = f"{ceilings['copy_gb_per_s']:,.0f} GB/s, {ceilings['gemm_tflops']:,.0f} TFLOP/s"
        lines.append(f"| device copy; bf16 GEMM of {ceilings['gemm_side']} cubed | {rates} | |")
    files = [figures for figures in tests.values() if isinstance(figures, dict)]
    if files:
        passed, failed, skipped = (sum(f[word] for f in files) for word in ("passed", "failed", "skipped"))
        cut = sum("ended" in f for f in files)
        counts = f"{passed} passed, {failed} failed, {skipped} skipped"
        if cut:
            counts += f"; {cut} files did not finish"
        lines.append(f"| kernel tests on the device | {counts} | none failed |")
    return [*lines, *(format_target(parts, row) for row in rows_for_card(card, targets)), *format_steps(parts)]


def format_steps(parts):
    """Return the lines about whole steps: MFU, the projected run, where a step's time goes, peers, several ranks."""
    steps, profiles, peers = (parts.get(name, {}).get("records", []) for name in ("step", "profile", "peers"))
    lines = []
    for r in steps:
        if r.get("mfu") is not None:
            figures = f"{r['tokens_per_s']:,.0f} tokens/s, {format_mfu(r)}, {r['peak_gib']:.1f} GiB"
            lines.append(f"| step, {r['name']}: MFU = {r['mfu_formula']} | {figures} | |")
    for p in parts.get("step", {}).get("projections", []):
        price = f", ${p['dollars']:.2f} at ${p['dollars_an_hour']} an hour ({p['price_of']})" if p["dollars"] else ""
        lines.append(f"| {p['what']} ({p['of']}): {p['steps']:,} steps | {p['minutes']:.1f} minutes{price} | |")
    for r in profiles:
        if "kinds" in r:
            kinds = sorted(r["kinds"].items(), key=lambda item: -item[1]["share"])
            shares = ", ".join(f"{kind} {part['share']:.1%}" for kind, part in kinds if part["share"] >= 0.001)
            lines.append(f"| where a step of {r['name']} goes: {r['launches']:,} launches | {shares} | |")
    for r in peers:
        if "ours_over_peer" in r:
            without = r.get("ours_without_sharing_over_peer")
            ratio = f"; ours is {r['ours_over_peer']:.2f}x" + (f", {without:.2f}x without sharing" if without else "")
            memory = "" if r["peak_gib"] is None else f", {r['peak_gib']:.1f} GiB"
            lines.append(f"| {r['name']} | {r['tokens_per_s']:,.0f} tokens/s{memory}{ratio} | |")
    return [*lines, *filter(None, map(format_ranks, parts.get("ranks", {}).get("records", [])))]


def format_ranks(r):
    """Return the line of a record of FSDP2's cost, of saves, or of a check; None for another record."""
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
