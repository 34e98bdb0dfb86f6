"""The sections of docs/measurements.md on data: de-duplication, a dataset from a server, reading and packing."""

from scripts.pages.decoding import spread
from scripts.pages.without_gpu import paragraph


def dedup(figures):
    stream, pairs = figures["stream"], figures["all_pairs"]
    assert pairs["same_decisions"]
    return [
        paragraph(
            "A stream of instructions is de-duplicated: one is dropped when its ROUGE-L with a kept one reaches "
            "0.7, exactly. The peer compares all pairs with rapidfuzz's bit-parallel code; only its comparing is "
            "counted. Both made the same decisions. Seconds of CPU on one thread."
        ),
        "",
        "| texts | kept | ours, s | all pairs, s | ratio |",
        "|---|---|---|---|---|",
        f"| {pairs['texts']:,} | {pairs['kept']:,} | {spread(pairs['cpu_s'], '.1f')} | "
        f"{spread(pairs['cdist_cpu_s'], '.1f')} | {spread(pairs['ratio'], '.1f')} |",
        f"| {stream['texts']:,} | {stream['kept']:,} | {spread(stream['cpu_s'], '.1f')} | | |",
    ]


def dedup_row(figures):
    pairs = figures["all_pairs"]
    what = f"de-duplicating {pairs['texts']:,} instructions exactly, seconds"
    peer = f"{pairs['cdist_cpu_s']['median']:.1f} (rapidfuzz, all pairs)"
    return what, f"{pairs['cpu_s']['median']:.1f}", peer, spread(pairs["ratio"], ".1f")


def data_gen(figures):
    run, killed, batches = (figures["runs"][name] for name in ("unbroken", "killed", "batches"))
    counts, cpu = run["counts"], figures["replay_cpu_s"]
    assert figures["identical"]
    failures = counts["attempts"] - counts["answers"] - counts["failed_requests"]
    return [
        paragraph(
            f"`data_gen.generate` builds {counts['kept']:,} rows from a test server that answers after "
            f"{figures['server']['latency_s']:g} s and fails on purpose ({failures:,} failures). The server shares "
            "the cores. Three runs must give one dataset, byte for byte, and did: one unbroken, one killed "
            f"{killed['kills']} times at random moments, and one in batches. Dollars are the test server's tokens "
            f"at ${run['cost']['usd_per_million_in']:g} and ${run['cost']['usd_per_million_out']:g} a million; "
            "nobody was paid."
        ),
        "",
        "| | |",
        "|---|---|",
        f"| requests, unbroken | {counts['requests']:,} |",
        f"| wall time | {run['wall_s']:.0f} s |",
        f"| CPU | {run['cpu_s']:.0f} s |",
        f"| peak memory | {run['peak_memory_bytes'] / 1e6:,.0f} MB |",
        f"| CPU to make the dataset anew from the answers | {cpu['all']:.0f} s: "
        f"de-duplication {cpu['de-duplication']:.1f} s, filters {cpu['tidy and filters']:.1f} s |",
        f"| recorded requests that the killed run sent again | {killed['recorded_and_sent_again']} |",
        f"| simulated dollars; in batches | ${run['cost']['spent_usd']:.2f}; ${batches['cost']['spent_usd']:.2f} |",
    ]  # fmt: skip


def data_servers(figures):
    servers = figures["servers"]
    assert not any(found["recorded_and_sent_again"] for found in servers.values())
    lines = [
        paragraph(
            "`data_gen.generate` asks real servers of SmolLM2-135M for three tasks a request, at $0.1 and $0.4 a "
            "million tokens (nobody was paid), is killed (SIGKILL) once, and goes on to its cap. The bill is the sum "
            "of the usages of the recorded answers; what was in flight at the kill is in doubt at the most it can "
            "have cost, and is asked again. Whole answers are those that the token limit did not cut."
        ),
        "",
        "| | " + " | ".join(found["version"] for found in servers.values()) + " |",
        "|---" * (len(servers) + 1) + "|",
    ]
    rows = {
        "taken at once": lambda found: f"`{found['format']}`",
        "whole answers that keep to it": lambda found: f"{found['whole_in_the_format']} of {found['whole']}",
        "what is told of it": lambda found: next(
            (line.partition(";")[0] for line in found["told_before_the_kill"] if "does not keep" in line), ""
        ),
        "answers recorded, and in flight, at the kill": lambda found: (
            f"{found['recorded_at_the_kill']}, {found['in_flight_at_the_kill']}"
        ),
        "recorded answers asked for again": lambda found: found["recorded_and_sent_again"],
        "answers at the end": lambda found: found["counts"]["answers"],
        "billed; by the usages; in doubt": lambda found: "; ".join(
            f"${usd:.6f}" for usd in (found["cost"]["spent_usd"], found["usage_usd"], found["cost"]["uncertain_usd"])
        ),
        "rows of tasks": lambda found: f"{found['counts']['kept']} of {found['counts']['items']}",
        "the end": lambda found: f"{found['status']}, exit {found['exit_code']}",
    }
    return lines + [
        f"| {name} | " + " | ".join(str(of(found)) for found in servers.values()) + " |" for name, of in rows.items()
    ]


def data_speed(figures):
    start, mix = figures["start"], figures["alpaca_lengths"]
    return [
        paragraph(
            f"{start['rows']:,} rows of {start['tokens_a_row']:.0f} tokens are read and tokenised, and once more "
            "from the token cache. Then rows of Alpaca's lengths are packed, 128 a step: 'computed' is the share "
            "of their tokens that are computed when the common prefix of a micro-batch is computed once, padding "
            "included."
        ),
        "",
        "| | |",
        "|---|---|",
        f"| first start | {start['first_start_s']['median']:.1f} s, {start['first_start_rows_per_s']:,.0f} rows/s |",
        f"| second start, cached | {start['cached_start_s']['median']:.2f} s |",
        "",
        "| most tokens of a micro-batch | micro-batches a step | computed | padding | a step's packing |",
        "|---|---|---|---|---|",
        *(
            f"| {e['max_tokens']:,} | {e['micro_batches_a_step']:.2f} | {e['computed_over_logical']:.1%} | "
            f"{e['padding']:.2%} | {1e3 * e['step_s']['median']:.1f} ms |"
            for e in mix["epochs"]
        ),
    ]  # fmt: skip
