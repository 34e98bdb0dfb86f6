"""The ids of real texts in training, and after export in the programs that read what we write.

    python -m scripts.parity.tokenizer_ids FOLDER_OR_GGUF ... --rows alpaca.json [--vectors NAME.gguf.inp ...]
        [--convert llama.cpp/convert_hf_to_gguf.py --llama-cpp COMMAND] [--json benchmarks/tokenizer_ids.json]

Each tokenizer is loaded as training loads it, and saved as a run saves it. The table counts the texts whose ids differ
from training's in: the saved folder read again, transformers' AutoTokenizer, the tokenizers library alone, and
llama.cpp after its own converter. For a GGUF, llama.cpp on the file itself too ("before"). Ids are compared with BOS,
where the tokenizer adds it. Texts that spell special tokens stay text.

--vectors: llama.cpp's test texts (its models/ggml-vocab-*.gguf.inp); where the .out beside it belongs to the tokenizer
of the same name, its ids are compared too. --llama-cpp: a command that gets a GGUF as its last argument and a JSON list
of texts on standard input, and writes the JSON list of their ids, BOS included; without it the package llama_cpp is
used where it is installed. Exits 1 if anything differs.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import tokenizers
import transformers

from engine.text.tokenizer import Tokenizer
from engine.text.tokenizer_files import load_tokenizer
from kernels.base.commands import run_command
from scripts.base.results import today, write_json

SEPARATOR = "\n__ggml_vocab_test__\n"  # between the texts of an .inp file
READERS = ("saved", "transformers", "tokenizers", "llama.cpp", "llama.cpp before", "vectors")
TRICKY = (
    "", " ", "  ", " a", "  a", "a ", "a  b", "a   b    c", " " * 33, "\n", "\n\n\n", " \n", "\t\ta", "a\r\nb\r\n",
    "don't I'LL", "</s>", "<s> hi", "a<|im_end|>b", "<0x41>", "12345 678 ½", "\n 1", "漢字かな", "👍🏽", "e\u0301 ñ",
    "\ufeffa", "def f(x):\n    return x",
)  # fmt: skip
LLAMA_CPP = """
import json, sys, llama_cpp
model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
print(json.dumps([model.tokenize(text.encode(), add_bos=True, special=False) for text in json.load(sys.stdin)]))
"""

Ids = list[list[int]]


def read_texts(rows: Path | None, vectors: Iterable[Path]) -> list[str]:
    """Return the texts to compare: each field of the rows, each text of the vectors, and what troubles tokenizers."""
    texts = list(TRICKY)
    for row in json.loads(rows.read_text()) if rows else []:
        texts += [row[key] for key in ("instruction", "input", "output") if row.get(key)]
    for path in vectors:
        texts += read_vector_texts(path)
    return texts


def read_vector_texts(path: Path) -> list[str]:
    """Return the texts of an .inp file, each of which ends with the separator."""
    with path.open(encoding="utf-8", newline="") as file:  # as it is: some texts hold \\r
        return file.read().split(SEPARATOR)[:-1]


def encode_as_training(tokenizer: Tokenizer, texts: Sequence[str]) -> Ids:
    """Return the ids of texts with BOS, as an example begins."""
    begin = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    return [begin + ids for ids in tokenizer.encode_batch(list(texts))]


def write_model_config(folder: Path, tokenizer: Tokenizer) -> None:
    """Write the config.json of a small LLaMA, from which AutoTokenizer and llama.cpp's converter learn the kind."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, **shape
    ).to_dict()
    config["architectures"] = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))


def encode_in_transformers(folder: Path, texts: Sequence[str]) -> Ids:
    """Return the ids that AutoTokenizer gives for texts."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text, split_special_tokens=True)["input_ids"] for text in texts]


def encode_in_tokenizers(folder: Path, texts: Sequence[str]) -> Ids:
    """Return the ids that the tokenizers library gives for texts, from tokenizer.json alone."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


def convert(script: Path, folder: Path) -> Path:
    """Return the GGUF that llama.cpp's converter makes of a folder's tokenizer."""
    out = folder / "converted.gguf"
    command = [sys.executable, script, folder, "--vocab-only", "--outfile", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode or not out.exists():
        raise SystemExit(f"{script.name} failed on {folder}:\n{done.stderr[-2000:]}")
    return out


def encode_in_llama_cpp(command: list[str], gguf: Path, texts: Sequence[str]) -> Ids:
    """Return the ids that llama.cpp gives for texts."""
    done = subprocess.run([*command, str(gguf)], input=json.dumps(texts), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed on {gguf}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def read_vectors(vocabulary: Path, vectors: Iterable[Path]) -> tuple[list[str], Ids] | None:
    """Return (texts, ids) of NAME.gguf.inp and NAME.gguf.out for the vocabulary NAME.gguf, None without them."""
    for path in vectors:
        if path.name == f"{vocabulary.name}.inp":
            lines = path.with_suffix(".out").read_text().splitlines()
            return read_vector_texts(path), [[int(id) for id in line.split()] for line in lines]
    return None


def compare(
    vocabulary: Path, texts: Sequence[str], vectors: Sequence[Path], script: Path | None, llama_cpp: list[str] | None
) -> dict[str, tuple[int, int]]:
    """Return {reader: (texts whose ids differ from training's, texts)} for a vocabulary."""
    tokenizer = load_tokenizer(vocabulary)
    for warning in tokenizer.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    wanted = encode_as_training(tokenizer, texts)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        tokenizer.save(folder)
        write_model_config(folder, tokenizer)
        found: dict[str, Callable[[], Ids]] = {
            "saved": lambda: encode_as_training(load_tokenizer(folder), texts),
            "transformers": lambda: encode_in_transformers(folder, texts),
            "tokenizers": lambda: encode_in_tokenizers(folder, texts),
        }
        if llama_cpp and script:
            found["llama.cpp"] = lambda: encode_in_llama_cpp(llama_cpp, convert(script, folder), texts)
        if llama_cpp and vocabulary.is_file():
            found["llama.cpp before"] = lambda: encode_in_llama_cpp(llama_cpp, vocabulary, texts)
        table = {}
        for reader, encode in found.items():
            differ = [n for n, (a, b) in enumerate(zip(wanted, encode(), strict=True)) if a != b]
            for n in differ[:5]:
                print(f"{vocabulary.name}, {reader}: {texts[n][:80]!r}", file=sys.stderr)
            table[reader] = (len(differ), len(texts))
    if own := read_vectors(vocabulary, vectors):
        ids = tokenizer.encode_batch(own[0])
        table["vectors"] = (sum(a != b for a, b in zip(ids, own[1], strict=True)), len(ids))
    return table


def main() -> None:
    """Print the table of the vocabularies that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vocabularies", nargs="+", type=Path, help="folders or .gguf files")
    parser.add_argument("--rows", type=Path, help="Alpaca JSON")
    parser.add_argument("--vectors", nargs="*", type=Path, default=[], help=".inp files")
    parser.add_argument("--convert", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--llama-cpp", type=shlex.split, help="command that tokenizes")
    parser.add_argument("--json", type=Path, help="where the figures go")
    args = parser.parse_args()
    llama_cpp = args.llama_cpp or ([sys.executable, "-c", LLAMA_CPP] if find_spec("llama_cpp") else None)
    texts = read_texts(args.rows, args.vectors)
    print(f"| vocabulary | {' | '.join(READERS)} |\n|---|{'---|' * len(READERS)}")
    tables = {}
    for vocabulary in args.vocabularies:
        table = compare(vocabulary, texts, args.vectors, args.convert, llama_cpp)
        cells = [f"{table[reader][0]} of {table[reader][1]}" if reader in table else "" for reader in READERS]
        print(f"| {vocabulary.name} | {' | '.join(cells)} |", flush=True)
        tables[vocabulary.name] = table
    if args.json:
        packages = ("transformers", "tokenizers", "sentencepiece", "llama_cpp_python")
        versions = {name: version(name) for name in packages if find_spec(name.removesuffix("_python"))}
        about = {"what": "texts whose ids differ from training's, of how many", "rows": args.rows and args.rows.name}
        write_json(args.json, {**about, "vocabularies": tables, "date": today(), **versions})
    sys.exit(any(count for table in tables.values() for count, _ in table.values()))


if __name__ == "__main__":
    run_command(main)
