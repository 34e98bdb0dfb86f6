"""The sections of docs/measurements.md on a model in use: other servers, clients, a crowd, lm-eval."""

from scripts.pages.decoding import spread
from scripts.pages.without_gpu import paragraph

NAMES = {"cria": "ours"}


def serving(figures):
    lines = [
        paragraph(
            f"Servers of SmolLM2-135M in {figures['dtype']} get {figures['what']}; there were {figures['rounds']} "
            "rounds, and the medians stand here, with the extremes of the ratios. Tokens are counted by the model's "
            "tokenizer. Asking and answering share the cores; the load average was "
            f"{figures['load_average']:.1f}, and the servers' CPU time stands beside the time on the clock. The "
            "prompts are the same in each round: from the second on, servers that keep prompts have them. Answers in "
            "bf16 differ with the order of sums."
        ),
        "",
        "| | tokens/s | ours is faster by | CPU ms a token | ours takes less CPU by | first token, s | equal answers |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in figures["servers"].items():
        ratios = (
            [spread(found[key], ".2f") for key in ("ours_over_it", "its_cpu_over_ours")] if name != "cria" else ["", ""]
        )
        lines.append(
            f"| {NAMES.get(name, name)} | {found['tokens_per_s']['median']:.0f} | {ratios[0]} | "
            f"{found['cpu_ms_a_token']['median']:.1f} | {ratios[1]} | {found['first_token_s']['median']:.2f} | "
            f"{found['equal_answers']} |"
        )
    return lines


def serving_row(figures):
    ours, servers = figures["servers"]["cria"], figures["servers"]
    name = max((name for name in servers if name != "cria"), key=lambda n: servers[n]["tokens_per_s"]["median"])
    what = f"serving {figures['what'].partition(' ')[0]} requests at once, tokens/s"
    peer = f"{servers[name]['tokens_per_s']['median']:.0f} ({name})"
    return what, f"{ours['tokens_per_s']['median']:.0f}", peer, spread(servers[name]["ours_over_it"], ".2f")


def clients(figures):
    told = figures["lines"]
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    lines = [
        paragraph(
            f"Clients as people install them ({versions}), and the calls that the servers of Open WebUI and LibreChat "
            "make. What each feature wants is in `scripts/serving/clients/`."
        ),
        "",
        "| client | as it expects | features |",
        "|---|---|---|",
    ]
    for name in dict.fromkeys(line["client"] for line in told):
        of_client = [line for line in told if line["client"] == name]
        features = ", ".join(line["feature"] for line in of_client)
        lines.append(f"| {name} | {sum(line['right'] for line in of_client)} of {len(of_client)} | {features} |")
    return lines


def crowd(figures):
    before, _, after = figures["held"]
    lines = [
        paragraph(
            f"{figures['requests']:,} clients come, {figures['at_once']} at a time, each drawn from the kinds below. "
            "503 with Retry-After is what a full queue says."
        ),
        "",
        "| client | got | times |",
        "|---|---|---|",
    ]
    for line in figures["got"]:
        lines.append(f"| {line['kind'].replace('_', ' ')} | {line['got']} | {line['n']} |")
    return [
        *lines,
        "",
        paragraph(
            f"The server held {before['resident_mb']:.0f} MB before (every kind had been there) and "
            f"{after['resident_mb']:.0f} MB after, {before['files']} and {after['files']} open files; no answer was "
            "left being written or waited for."
        ),
    ]


def lm_eval(figures):
    return [
        paragraph(
            f"lm-eval {figures['lm_eval']} scores {figures['answers']} answers with the exported folder of "
            f"{figures['model']} through transformers {figures['transformers']} in fp32, offline; the engine scores "
            f"the same tokens. Log-likelihoods sum to {figures['log_likelihood']['lm_eval']:,.2f} and "
            f"{figures['log_likelihood']['ours']:,.2f}; one differs by {figures['largest_relative_difference']:.1e} of "
            "itself at most."
        )
    ]
