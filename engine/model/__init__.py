"""The LLaMA itself: its shape, its forward pass, the batch it takes."""
