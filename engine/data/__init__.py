"""Dataset files to micro-batches."""
