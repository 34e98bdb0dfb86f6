"""Whole training steps on a GPU: speed, breakdown, peers, several ranks."""
