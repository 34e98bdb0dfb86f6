"""Write an HTML page about an instruction dataset.

    python -m data_gen.report out/data/dataset.json
    python -m data_gen.report rows.jsonl --out rows.html
    python -m data_gen.report chats.parquet --out chats.html

FILE is what engine.finetune reads: Alpaca rows, chats, prompts with completions or text, as JSON, JSONL, CSV or
parquet, also gzipped. Bad rows are counted and left out. The page also uses rejected.jsonl and run.json of a generation
run if they lie beside it.
"""

from data_gen.base.cli import Parser, run_command
from data_gen.page.report import write_report


def main(argv: list[str]) -> None:
    """Write the report and print its path."""
    parser = Parser("report", __doc__)
    parser.add_argument("file", metavar="FILE", help="of rows")
    parser.add_argument("--out", metavar="PATH", help="the page; without it report.html beside FILE")
    args = parser.parse_args(argv)
    print(write_report(args.file, args.out))


if __name__ == "__main__":
    run_command(main)
