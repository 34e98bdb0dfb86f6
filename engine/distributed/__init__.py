"""Several GPUs as one run. No other package imports torch.distributed."""
