"""Text to token ids and back: tokenizers and prompt templates."""
