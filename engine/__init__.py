"""Fine-tuning, and what surrounds it."""

import os

# Micro-batches differ in length from step to step. With expandable segments the allocator can use the memory of one
# length for another; segments of fixed size leave gaps. torch reads the variable when CUDA is initialised. A setting
# that the user made is kept.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
