"""The sections of docs/measurements.md about kernels that are compiled and executed without a GPU."""

import textwrap


def paragraph(text: str) -> str:
    """Return the text in lines of the page's width."""
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def static(figures):
    records = figures["records"]
    chips = sorted({r["chip"] for r in records}, key=lambda chip: int(chip.removeprefix("sm_")))
    versions = sorted({r["triton"] for r in records})
    return [
        paragraph(
            "Every launch configuration that ships is compiled for each chip by the oldest and by the newest "
            "supported Triton, and the machine code is judged. [kernels.md](kernels.md) has the registers, shared "
            "memory and occupancy of each."
        ),
        "",
        "| | |",
        "|---|---|",
        f"| chips | {', '.join(chips)} |",
        f"| Triton | {', '.join(versions)} |",
        f"| compilations | {len(records)} |",
        f"| spills | {sum(r['spills'] for r in records)} |",
    ]


def simulated(figures):
    records = figures["records"]
    worst = {}
    for r in sorted(records, key=lambda r: r["ratio"]):
        worst[r["op"]] = r
    return [
        paragraph(
            "Every op is executed without a GPU, forward and backward, as the oldest and the newest supported Triton "
            "compile it, on a machine that checks each access. An error is against fp64; ours may be at most twice "
            "torch's in the same dtype. [kernels.md](kernels.md) has every case, and its memory traffic."
        ),
        "",
        "| | |",
        "|---|---|",
        f"| chips | {', '.join(sorted({r['chip'] for r in records}))} |",
        f"| Triton | {', '.join(sorted(figures['versions']))} |",
        f"| executed cases, each twice | {len(records)} |",
        f"| results beyond that | {sum(len(r['wrong']) for r in records)} |",
        f"| findings: races, missing waits, accesses out of bounds | {sum(r['n_findings'] for r in records)} |",
        "",
        "| op | cases | largest error beside torch's: ours | torch | of |",
        "|---|---|---|---|---|",
        *(
            f"| {op} | {sum(r['op'] == op for r in records)} | {r['error']:.2g} | {r['torch_error']:.2g} | "
            f"{r['worst']} of {r['case']}, {r['dtype']} |"
            for op, r in sorted(worst.items())
        ),
    ]  # fmt: skip


def step_launches(figures):
    before, now = (figures["records"][label] for label in ("before", "now"))
    kinds = sorted(before["kinds"], key=lambda kind: -before["kinds"][kind]["bytes"])
    nothing = dict.fromkeys(now["all"], 0)
    parts = [(kind, *(record["kinds"].get(kind, nothing) for record in (before, now))) for kind in kinds]

    def cells(count):
        instructions = f"{count['instructions'] / 1e9:.2f}" if count["instructions"] else "-"
        return count["launches"], f"{count['bytes'] / 1e9:.1f}", instructions

    rows = [
        (kind, *(cell for pair in zip(cells(a), cells(b), strict=True) for cell in pair))
        for kind, a, b in [*parts, ("all", before["all"], now["all"])]
    ]
    return [
        paragraph(
            f"One step of {now['variant']['model']} on {now['chip']}: 128 rows of Alpaca's lengths in one micro-batch, "
            "loss, backward, gradient norm and AdamW with 8-bit states. The step is counted, not timed: bytes are the "
            "least that each launch can move, and instructions those of our kernels' warps, executed on the PTX "
            "machine. Before: commit 252d015, whose GEMMs still added the residual."
        ),
        "",
        "| kind | launches before | now | GB before | now | G instructions before | now |",
        "|---|---|---|---|---|---|---|",
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
    ]
