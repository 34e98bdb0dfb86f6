"""Load a model and get the logits of a text: python examples/logits.py [MODEL]"""

import sys

import torch

from engine.serving.models import load_model

name = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
model, tokenizer, _ = load_model(name, torch.device("cpu"), torch.float32)

tokens = torch.tensor(tokenizer.encode("The capital of France is"))
with torch.no_grad():
    logits = model.logits(model(tokens))  # (T, vocabulary)
for id in logits[-1].topk(3).indices.tolist():
    print(repr(tokenizer.decode([id])), f"{logits[-1].softmax(-1)[id]:.3f}")
