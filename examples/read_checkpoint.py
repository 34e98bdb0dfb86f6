"""Read a training state of a run, checkpoint-N: python examples/read_checkpoint.py OUT/checkpoint-N"""

import sys
from pathlib import Path

from engine.model.llama import new_model
from engine.output.state_as_model import open_training_state

state = open_training_state(Path(sys.argv[1]))
model = new_model(state.config, "cpu", state.dtype)
state.read_into(model)
manifest = state.checkpoint.manifest
print(f"step {manifest['step']}, {state.config.n_parameters:,} parameters in {state.dtype}, style {state.prompt_style}")
print(f"norm of the embedding: {model.tok_embeddings.float().norm():.3f}")
