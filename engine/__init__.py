"""Fine-tuning, and what surrounds it."""

import os

# Micro-batches differ in length from step to step. Segments that grow let the allocator give one's memory to another,
# where fixed ones leave gaps. Read when CUDA begins; a setting of the user's own stands.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
