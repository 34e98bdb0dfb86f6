"""The training and held-out examples of a run, from files or from the token cache."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from engine.base.errors import DataError
from engine.base.terminal import Progress, plural, track
from engine.data import token_cache
from engine.data.data_files import map_file
from engine.data.dataset import Dataset, Table, count_shared, encode_rows, hold_out
from engine.data.rows import Skipped, read_rows, resolve_data_paths
from engine.data.values import Place
from engine.distributed.world import World
from engine.text.templates import Row, render_row
from engine.text.tokenizer import Tokenizer
from engine.training.config import FinetuneConfig

SILENT_BYTES = 4_000_000  # of files that are read in a tenth of a second, without a progress bar


def read_datasets(
    config: FinetuneConfig, tokenizer: Tokenizer, world: World, say: Callable[[str], None]
) -> tuple[Dataset, Dataset | None]:
    """Return the training examples and the held-out ones, None where nothing is held out.

    Prints what was read. Raises DataError for files that cannot be read or leave no example.
    """

    def read():
        return read_tables(config, tokenizer, say, show_progress=world.is_main)

    # With a cache, rank 0 tokenises and fills it before the other ranks read it.
    tables, is_cached = read() if config.token_cache == "off" else world.run_on_main_first(read)
    table, skipped, _ = tables[0]
    if config.eval_fraction:
        kept, held = hold_out(range(len(table)), config.eval_fraction, config.seed)
        if not kept:
            raise DataError(f"--eval-fraction {config.eval_fraction} of {len(held)} rows leaves none to train on")
        train, held_out = table.select(kept), table.select(held)
    else:
        train, held_out = table.select(), tables[1][0].select() if len(tables) > 1 else None
    train.counts["skipped"] = len(skipped)
    held_skipped = tables[1][1] if len(tables) > 1 else []
    all_skipped = [*skipped, *held_skipped]
    for bad in all_skipped[:5]:
        say(f"skipped {bad.source}: {bad.reason}")
    if len(all_skipped) > 5:
        say(f"skipped {len(all_skipped) - 5} more")
    if unread := sum((unread for *_, unread in tables), Counter[str]()):
        told = ", ".join(f"{key} ({plural(n, 'row')})" for key, n in unread.most_common())
        say(f"note: keys of rows that are not read: {told}")
    counts = train.counts
    say(
        f"data{' (cached)' if is_cached else ''}: "
        f"{counts['rows']} rows, {counts['examples']} examples, {counts['tokens']} tokens, "
        f"{counts['loss_tokens']} with loss; {counts['truncated']} truncated at {config.max_length}, "
        f"{counts['dropped']} dropped without a response token, {len(skipped)} bad rows skipped"
        + (describe_held_out(held_out, len(held_skipped)) if held_out else "")
    )
    for note in describe_odd_rows(counts, config.max_length):
        say(f"note: {note}")
    if held_out and (n_shared := count_shared(train, held_out)):
        say(
            f"warning: {n_shared} of {plural(len(held_out), 'held-out example')} "
            f"{'is' if n_shared == 1 else 'are'} in the training data too, word for word: held-out loss and scores say "
            "less of unseen rows; leave them out of one"
        )
    return train, held_out


def describe_held_out(held_out: Dataset, n_skipped: int) -> str:
    """Return what is said of held-out examples, and of the rows among them that are not measured."""
    dropped = held_out.counts["dropped"]
    told = f"; held out: {plural(len(held_out), 'example')}"
    if dropped or n_skipped:
        told += f", {dropped} dropped without a response token, {plural(n_skipped, 'bad row')} skipped"
    return told


def describe_odd_rows(counts: Mapping[str, int], max_length: int) -> Iterator[str]:
    """Yield a sentence on each kind of rows that teach nothing, or to say nothing."""
    if n := counts["empty"]:
        yield f"{plural(n, 'row')} {'has' if n == 1 else 'have'} an empty answer: the model learns to end there at once"
    if n := counts["dropped"]:
        yield (
            f"{plural(n, 'row')} {'is' if n == 1 else 'are'} dropped, whose answer begins after {max_length} tokens or "
            "carries no loss: a larger --max-length keeps what is only long"
        )


def read_tables(
    config: FinetuneConfig, tokenizer: Tokenizer, say: Callable[[str], None], show_progress: bool = True
) -> tuple[list[tuple[Table, Sequence[Skipped], Counter[str]]], bool]:
    """Return the tokenised rows, the skipped ones and the rows by a key that is not read, of --data and of --eval-data.

    The second value says whether all of it came from the token cache. Every file is checked before the long work
    begins.
    """
    cache = token_cache.find_cache(config.token_cache)
    settings = config.prompt_style, config.max_length, config.train_on_prompt

    def key_of(paths):
        return token_cache.compute_key(paths, tokenizer, *settings, config.skip_bad_rows) if cache else ""

    opened = []
    for names in filter(None, (config.data, config.eval_data)):
        paths = resolve_data_paths(names)
        key = key_of(paths)
        entry = token_cache.load_entry(cache, key, paths, config.max_length, say) if cache else None
        read = None if entry else read_files(paths, config, show_progress)
        opened.append((paths, key, entry, read))
    tables: list[tuple[Table, Sequence[Skipped], Counter[str]]] = []
    for paths, key, entry, read in opened:
        if read is not None:
            rows, skipped, unread = read
            if config.skip_bad_rows:
                rows, refused = drop_refused_rows(rows, tokenizer, config.prompt_style)
                skipped = [*skipped, *refused]
            table = encode_rows(rows, tokenizer, *settings, watch_blocks if show_progress else iter)
            entry = table, list(skipped), unread
            if cache and table.rows["n_loss"].any() and key == key_of(paths):  # no file changed meanwhile
                token_cache.save_entry(cache, key, table, skipped, unread, paths, say)
        assert entry is not None
        tables.append(entry)
    return tables, all(read is None for *_, read in opened)


def read_files(
    paths: Sequence[Path], config: FinetuneConfig, show_progress: bool = True
) -> tuple[Sequence[Row], Sequence[Skipped], Counter[str]]:
    """Read the rows of dataset files, with a progress bar where they are large. Count the keys that are not read."""
    unread = Counter[str]()

    def read(progress: Callable[[int, int], None] | None = None):
        with_tools = config.prompt_style == "template"
        return *read_rows(paths, config.skip_bad_rows, progress, with_tools=with_tools, unread=unread), unread

    if not show_progress or sum(len(map_file(path)) for path in paths) < SILENT_BYTES:
        return read()
    with Progress(None, unit="reading MB") as bar:

        def report(done_bytes, total_bytes):
            bar.total = total_bytes // 10**6
            bar.advance(done_bytes // 10**6 - bar.done)

        return read(report)


def drop_refused_rows(rows: Sequence[Row], tokenizer: Tokenizer, style: str) -> tuple[list[Row], list[Skipped]]:
    """Return (the rows that a template can say, those that it cannot). Raise DataError where it can say none."""
    kept: list[Row] = []
    refused: list[Skipped] = []
    for row in rows:
        try:
            render_row(row, style, tokenizer)
            kept.append(row)
        except DataError as error:
            assert isinstance(row.source, Place)  # as of every row of a file
            if len(refused) == len(rows) - 1:  # all of them
                raise
            refused.append(Skipped(row.source, str(error).removeprefix(f"{row.source}: ")))
    return kept, refused


def watch_blocks(blocks: range) -> Iterator[int]:
    """Return an iterator over blocks of rows to tokenise, with a progress bar where there are several."""
    return track("tokenising", blocks) if len(blocks) > 1 else iter(blocks)
