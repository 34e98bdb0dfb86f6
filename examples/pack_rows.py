"""Pack rows of several lengths into micro-batches, the template that they share computed once: examples/pack_rows.py"""

import sys

from engine.data.dataset import encode_rows
from engine.data.packing import Packing, make_micro_batches
from engine.formats.find import find_model
from engine.text.templates import Row
from engine.text.tokenizer_files import load_tokenizer

tokenizer = load_tokenizer(find_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"))
asked = [("Name a fruit.", "An apple."), ("Name three colours.", "Red, green and blue."), ("Say hello.", "Hello!")]
rows = [Row(f"mine:{n}", None, instruction, output=output) for n, (instruction, output) in enumerate(asked)]

dataset = encode_rows(rows, tokenizer).select()
for batch in make_micro_batches(dataset.get_examples(range(len(dataset))), Packing(max_tokens=512)):
    print(
        f"{len(batch.tokens)} rows of the tensors for {int(dataset.lengths().sum())} tokens in {len(dataset)} examples"
    )
    print("documents (start, end, prefix start, prefix end):", batch.documents.tolist())
