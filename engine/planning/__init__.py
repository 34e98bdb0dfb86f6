"""Answers before a run: does it fit, how long does it take, what does it cost."""
