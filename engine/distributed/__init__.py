"""Several GPUs as one run. The only package that imports torch.distributed."""
