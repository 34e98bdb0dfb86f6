"""Fine-tuning, and what surrounds it."""

import os

# Micro-batches differ in length from step to step. With expandable segments the allocator can use the memory of one
# length for another; segments of fixed size leave gaps. torch reads the variable when CUDA is initialised. A setting
# that the user made is kept.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"

# OpenMP's threads (GCC's, which torch brings) spin 300,000 times before they sleep: 14 ms on processors whose pause
# takes 140 cycles. Where other programs use the cores too, they spin while those they wait for cannot run. It reads
# the variable when torch is imported. A setting that the user made is kept here too.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
    os.environ["GOMP_SPINCOUNT"] = "10000"
