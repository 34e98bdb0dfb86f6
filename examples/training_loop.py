"""A training loop of twenty lines, with a loss of your own: python examples/training_loop.py [MODEL]

The loss here is cross entropy with a penalty on large logits; any function of the logits will do.
"""

import sys

import torch
import torch.nn.functional as F

from engine.data.dataset import encode_rows
from engine.data.packing import Packing, make_micro_batches
from engine.serving.models import load_model
from engine.text.templates import Row

name = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
model, tokenizer, _ = load_model(name, torch.device("cpu"), torch.float32)
rows = [Row(f"mine:{n}", None, f"Double {n}.", output=f"It is {2 * n}.") for n in range(8)]
dataset = encode_rows(rows, tokenizer).select()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

for step in range(4):
    total = 0.0
    for batch in make_micro_batches(dataset.get_examples(range(len(dataset))), Packing(max_tokens=1024)):
        hidden = model(batch.tokens, batch.positions, batch.documents)
        logits = model.logits(hidden[batch.loss_rows])
        loss = F.cross_entropy(logits, batch.targets) + 1e-4 * logits.logsumexp(-1).square().mean()
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}  loss {total:.4f}")
