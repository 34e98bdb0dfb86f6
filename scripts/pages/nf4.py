"""The section of docs/measurements.md about NF4 beside bitsandbytes."""

from scripts.pages.decoding import spread
from scripts.pages.without_gpu import paragraph


def nf4(figures):
    seconds, compared = figures["seconds_per_billion"], figures["compared"]
    shapes = {name.split(")")[0] + ")" for counts in compared.values() for name in counts["shape_matters"]}
    ways = {"quantise": "bf16 to NF4", "dequantise": "NF4 to bf16"}

    def line(step):
        ours, reference, theirs = (seconds[step + who] for who in ("", ", reference", ", bitsandbytes"))
        cells = spread(ours, ".2f"), spread(reference, ".1f"), spread(theirs, ".2f")
        return f"| {ways[step]} | {' | '.join(cells)} | {theirs['median'] / ours['median']:.1f} |"

    return [
        paragraph(
            f"Tensors are quantised to NF4 with double quantisation ({figures['bits_a_number']:.3f} bits a number) "
            f"here and by bitsandbytes {figures['bitsandbytes']}, on a CPU in one thread. The codes, the maxima's "
            "codes, their maxima, the mean, and the numbers in fp32 and bf16 are compared bit for bit, from the "
            "reference and from C++."
        ),
        "",
        "| tensors | how many | numbers | parts that differ |",
        "|---|---|---|---|",
        *(
            f"| {name} | {counts['tensors']} | {counts['numbers']:,} | {sum(counts['different'].values())} |"
            for name, counts in compared.items()
        ),
        "",
        paragraph(
            "bitsandbytes is asked for the numbers as one row: given rows of 16, 32 or 48 numbers beyond blocks of 64, "
            "it takes the maxima of other blocks on AVX-512 (here for the shapes "
            f"{', '.join(sorted(shapes)) or 'none'})."
        ),
        "",
        paragraph(
            "CPU seconds a billion numbers in one thread, in turns, as other programs shared the machine. A copy of "
            f"bf16 takes {spread(seconds['copy'], '.2f')}."
        ),
        "",
        "| | ours, C++ | ours, plain PyTorch | bitsandbytes | faster by |",
        "|---|---|---|---|---|",
        *map(line, ways),
    ]
