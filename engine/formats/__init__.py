"""Models of other programs, found, checked, read and written: Hugging Face, Meta, GGUF."""
