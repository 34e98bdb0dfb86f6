"""Damage the files that the engine reads, and see that each is read as before or refused with exit 2 or 3, in time.

    python -m scripts.fuzz --seconds 60 [--seed 0] [--reader gguf]

Bits are flipped, ends cut off, values of JSON changed for others, huge ones and deeply nested ones. A line for each
reader: inputs tried, refused, read as before, read otherwise where the format cannot tell (no checksum covers a weight
of safetensors or of a GGUF, nor a word of a JSON file), read otherwise where it can (wrongly), other errors, and the
CPU seconds of the slowest. The command exits with 1 where any was wrong, another error or slower than --limit.
"""

import argparse
import contextlib
import io
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_gen.api.ledger import LEDGER_NAME, Ledger
from data_gen.api.prices import read_price_table
from data_gen.base.cli import DataError as DataGenError
from data_gen.base.cli import UsageError as DataGenUsageError
from data_gen.judging.answers import read_answers
from data_gen.page.report import write_report as write_dataset_report
from data_gen.rows.contamination import Decontaminator
from engine.base.errors import DataError, UsageError
from engine.comparing.vote_file import VoteFile
from engine.data import token_cache
from engine.data.dataset import encode_rows
from engine.data.prompts import read_prompts
from engine.data.rows import read_rows
from engine.formats.names import list_pieces
from engine.formats.save import list_tensors, save_hf, save_meta
from engine.formats.source import open_source
from engine.model.config import ModelConfig
from engine.model.llama import Transformer
from engine.model.shard import as_shards
from engine.output import checkpoint
from engine.output.folder import read_prompt_style
from engine.output.report import write_report
from engine.output.saver import WriterGroup, write_checkpoint
from engine.text.tokenizer_files import load_tokenizer
from kernels.base.commands import run_for_reader
from scripts.base.damaged import damage

CONFIG = ModelConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, hidden_dim=32, vocab_size=260, max_seq_len=64)
REFUSED = (DataError, UsageError, DataGenError, DataGenUsageError)
ROWS = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(3)]
CHAT = [{"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}]}] * 2


@dataclass(frozen=True)
class Reader:
    """What reads a folder of files. proven: names of the files in which every flipped bit must be seen."""

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    proven: tuple[str, ...] = ()


# ---- readers and what they read -------------------------------------------------------------------------------------


def make_model() -> Transformer:
    """Return a small model of fixed random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer(CONFIG, "ref")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0, 0.1)
    return model


def write_gguf(folder: Path) -> None:
    """Write a model with a byte-level tokenizer as one GGUF file."""
    import gguf

    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    sizes = {
        "block_count": CONFIG.n_layers, "embedding_length": CONFIG.dim, "feed_forward_length": CONFIG.hidden_dim,
        "attention.head_count": CONFIG.n_heads, "attention.head_count_kv": CONFIG.n_kv_heads,
        "context_length": CONFIG.max_seq_len,
    }  # fmt: skip
    for key, value in sizes.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", CONFIG.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(0x100 + i) for i in range(CONFIG.vocab_size)])
    writer.add_token_merges(["\u0100 \u0101"])
    writer.add_eos_token_id(0)
    assert list_pieces(CONFIG, "gguf")
    for name, _, _, load in list_tensors(make_model(), "gguf", torch.float32):
        writer.add_tensor(name, load().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_weights(path: Path) -> Any:
    """Return the config of a model and all its numbers."""
    source = open_source(path)
    return source.config, {name: [part.clone() for *_, part in one.blocks()] for name, one in source.stored.items()}


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer.json with its config."""
    vocab = {chr(0x100 + i): i for i in range(256)}
    spec = {
        "version": "1.0", "added_tokens": [{"id": 256, "content": "</s>", "special": True, "single_word": False,
        "lstrip": False, "rstrip": False, "normalized": False}], "normalizer": None, "post_processor": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "add_bos_token": False}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256], "bos_token_id": 1}))


def write_state(folder: Path) -> None:
    """Write a training state."""
    facts = {"settings": {"lr": 1.0}, "model": {"dim": 4}, "n_updates": 3, "max_tokens": 64}
    write_checkpoint(folder, 1, 3, lambda: as_shards({"a": torch.arange(6.0)}), facts, WriterGroup())


def read_state(folder: Path) -> Any:
    """Return the numbers and the facts of the newest state."""
    found = checkpoint.find_newest(folder, lambda text: None)
    tensors = {"a": torch.zeros(6)}
    if found:
        checkpoint.load(found, tensors)
    return tensors["a"].tolist(), found and found.manifest.get("n_updates")


def write_run(folder: Path) -> None:
    """Write what a run leaves: run.json and metrics.jsonl."""
    run = {"config": {"prompt_style": "alpaca", "lr": 1e-5}, "model": {"parameters": 9}, "data": {"rows": 3}}
    lines = [{"event": "train", "step": i, "loss": 1.0 / i, "lr": 1e-5, "grad_norm": 1.0} for i in range(1, 4)]
    (folder / "run.json").write_text(json.dumps(run | {"status": "done", "environment": {"device": "cpu"}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_run(folder: Path) -> Any:
    """Return the report's bytes and the prompt style of a run."""
    style = read_prompt_style(folder)
    return style, write_report(folder).read_bytes()


def read_votes(folder: Path) -> Any:
    """Return the votes of a file."""
    file = VoteFile(folder / "votes.jsonl")
    try:
        return [kept.row for kept in file.kept]
    finally:
        file.close()


def write_rows(name: str, rows: list[dict[str, Any]]) -> Callable[[Path], None]:
    """Return a function that writes rows as JSON or JSONL into a folder."""
    text = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
    return lambda folder: (folder / name).write_text(text) and None


def write_sentencepiece(folder: Path) -> None:
    """Write a tokenizer.model of 300 pieces, as LLaMA's."""
    import sentencepiece

    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"line {i}: the quick brown fox {i * i}" for i in range(99)]), model_writer=content,
        vocab_size=300, model_type="bpe", byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(content.getvalue())


def read_sentencepiece(folder: Path) -> Any:
    """Return the ids of a text and the special tokens of a tokenizer.model."""
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode_batch(["the quick brown fox, 12 \u00e9"])
    return [list(one) for one in ids], tokenizer.bos_id, tokenizer.eos_id, sorted(tokenizer.stop_ids)


def write_tokens(folder: Path) -> None:
    """Write an entry of the token cache."""
    write_tokenizer(folder)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    rows, _ = read_rows([folder / "rows.json"])
    table = encode_rows(rows, load_tokenizer(folder), max_length=64)
    for path in folder.iterdir():
        path.unlink()
    token_cache.save_entry(folder, "0" * 64, table, [], Counter({"id": 3}), [folder / "rows.json"], print)


def read_tokens(folder: Path) -> Any:
    """Return the numbers of an entry of the token cache. Raise DataError where it is taken for none."""
    found = token_cache.load_entry(folder, "0" * 64, [folder / "rows.json"], 64, lambda text: None)
    if found is None:
        raise DataError("it is tokenised again")
    table, skipped, unread = found
    return table.tokens.tolist(), table.is_target.tolist(), table.rows.tolist(), len(skipped), dict(unread)


def write_ledger(folder: Path) -> None:
    """Write a ledger of five requests."""
    ledger = Ledger(folder)
    ledger.write_settings(seed=0, dialect={"format": "json_object"})
    for request in range(5):
        attempt, intent = ledger.prepare_intent(request, "0" * 64, "m", 1000)
        answer = {"choices": [{"message": {"content": "Yes."}, "finish_reason": "stop"}], "model": "m"}
        body = json.dumps(answer | {"usage": {"prompt_tokens": 9, "completion_tokens": request}})
        ledger.commit([intent, ledger.prepare_outcome(attempt, "answer", 200, body, (9, request), 70 + request)])
    ledger.close()


def read_ledger(folder: Path) -> Any:
    """Return all that a ledger tells."""
    ledger = Ledger(folder, create=False)
    try:
        return list(ledger.read_outcomes()), ledger.read_settings(), ledger.compute_totals(), ledger.list_missing()
    finally:
        ledger.close()


def write_dataset(folder: Path) -> None:
    """Write what data_gen.generate leaves: dataset.jsonl, rejected.jsonl and run.json."""
    rows = [row | {"provenance": {"request": i, "item": 0, "model": "m", "usd": 0.1}} for i, row in enumerate(ROWS)]
    lost = [{"request": 1, "item": 2, "reason": "duplicate", "detail": "", "similarity": 0.8, **ROWS[0]}]
    counts = {"kept": 3, "items": 4, "requests": 2, "rejected": {"duplicate": 1}, "repaired": {}}
    run = {"status": "done", "settings": {"seed": 0}, "counts": counts, "cost": {"spent_usd": 0.3}, "models": {"m": 2}}
    for name, lines in (("dataset", rows), ("rejected", lost)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.json").write_text(json.dumps(run))


def read_dataset(folder: Path) -> str:
    """Return the page about a dataset, without the warning of a damaged run.json."""
    with contextlib.redirect_stderr(io.StringIO()):
        return write_dataset_report(folder / "dataset.jsonl").read_text()


def write_prices(folder: Path) -> None:
    """Write a table of prices."""
    models = {"a": [1, 2.5], "b": {"input": 0.1, "output": 3, "as_of": "2026-01-02", "ends": "2027-03-04"}}
    (folder / "p.json").write_text(json.dumps({"as_of": "2026-11-30", "host": "h", "batch": 0.5, "models": models}))


VOTE = {"prompt": "Say 1.", "models": ["A", "B"], "vote": "A"}
READERS = {
    "hf": Reader(lambda folder: save_hf(folder, make_model(), eos_ids=(0,)), read_weights),
    "meta": Reader(lambda folder: save_meta(folder, make_model()), read_weights, ("consolidated.00.pth",)),
    "gguf": Reader(write_gguf, lambda folder: read_weights(folder / "m.gguf")),
    "gguf tokenizer": Reader(write_gguf, lambda folder: load_tokenizer(folder / "m.gguf").describe()),
    "tokenizer": Reader(write_tokenizer, lambda folder: load_tokenizer(folder).describe()),
    "rows": Reader(write_rows("r.json", ROWS), lambda folder: read_rows([folder / "r.json"])[0]),
    "chats": Reader(write_rows("r.jsonl", CHAT), lambda folder: read_rows([folder / "r.jsonl"])[0]),
    "prompts": Reader(write_rows("p.jsonl", ROWS), lambda folder: read_prompts(folder / "p.jsonl")),
    "state": Reader(write_state, read_state, ("state.safetensors",)),
    "run": Reader(write_run, read_run),
    "shards": Reader(lambda folder: save_hf(folder, make_model(), max_shard_bytes=9000, eos_ids=(0,)), read_weights),
    "tokenizer.model": Reader(write_sentencepiece, read_sentencepiece),
    "tokens": Reader(write_tokens, read_tokens, ("tokens.npy", "is_target.npy", "rows.npy")),
    "ledger": Reader(write_ledger, read_ledger, (LEDGER_NAME,)),
    "dataset": Reader(write_dataset, read_dataset),
    "prices": Reader(write_prices, lambda folder: read_price_table(folder / "p.json")),
    "answers": Reader(write_rows("a.json", ROWS), lambda folder: read_answers(folder / "a.json")),
    "evaluation": Reader(write_rows("e.jsonl", ROWS), lambda folder: Decontaminator([folder / "e.jsonl"]).prompts),
    "votes": Reader(write_rows("votes.jsonl", [VOTE] * 3), read_votes),
}


# ---- reading what is damaged ----------------------------------------------------------------------------------------


def is_same(a: Any, b: Any) -> bool:
    """Return whether two things that were read are equal, tensor by tensor."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(is_same, a, b))
    return bool(a == b)


@dataclass
class Tally:
    """What came of the inputs of one reader."""

    counts: Counter[str]
    slowest: float
    faults: list[str]


def fuzz(reader: Reader, folder: Path, seed: int, more: Callable[[int], bool]) -> Tally:
    """Damage a reader's files again and again, while more(inputs tried) says so, and return what came of it."""
    reader.make(folder)
    originals = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    files = [path for path, raw in originals.items() if raw and not path.name.endswith(".html")]
    wanted, rng, tally = reader.read(folder), random.Random(seed), Tally(Counter(), 0.0, [])
    while more(tally.counts["tried"]):
        path = rng.choice(files)
        kind, content = damage(originals[path], path.name, rng)
        path.write_bytes(content)
        tally.counts["tried"] += 1
        began = time.process_time()
        try:
            found = "same" if is_same(reader.read(folder), wanted) else "otherwise"
        except REFUSED:
            found = "refused"
        except Exception as error:
            found = "error"
            tally.faults.append(f"{path.name}, {kind}: {type(error).__name__}: {str(error)[:200]}")
        if found == "otherwise" and path.name in reader.proven:
            found = "wrong"
            tally.faults.append(f"{path.name}, {kind}: read otherwise")
        tally.counts[found] += 1
        tally.slowest = max(tally.slowest, time.process_time() - began)
        restore(folder, originals)
    return tally


def restore(folder: Path, originals: dict[Path, bytes]) -> None:
    """Write the files that are not as they were again, and remove those that a reader made."""
    for path in [path for path in folder.rglob("*") if path.is_file() and path not in originals]:
        path.unlink()
    for path, raw in originals.items():
        if not path.exists() or path.read_bytes() != raw:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(raw)


def main() -> int:
    """Fuzz every reader for its share of the seconds, print what came of it, and return the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of CPU, for all readers together (60)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (0)")
    parser.add_argument("--reader", choices=READERS, help="one reader alone")
    parser.add_argument("--limit", type=float, default=20.0, help="CPU seconds that one input may take (20)")
    args = parser.parse_args()
    names = [args.reader] if args.reader else list(READERS)
    torch.set_num_threads(1)
    columns, is_bad = ("tried", "refused", "same", "otherwise", "wrong", "error"), False
    print(f"{'reader':16}" + "".join(f"{column:>11}" for column in columns) + f"{'slowest s':>11}")
    for name in names:
        until = time.process_time() + args.seconds / len(names)
        with tempfile.TemporaryDirectory() as folder:
            tally = fuzz(READERS[name], Path(folder), args.seed, lambda n, until=until: time.process_time() < until)
        counts = "".join(f"{tally.counts[column]:11}" for column in columns)
        print(f"{name:16}{counts}{tally.slowest:11.3f}", flush=True)
        for fault in list(dict.fromkeys(tally.faults))[:10]:
            print(f"  {fault}", flush=True)
        is_bad |= bool(tally.faults) or tally.slowest > args.limit
    return int(is_bad)


if __name__ == "__main__":
    sys.exit(run_for_reader(main))
