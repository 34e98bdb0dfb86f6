"""Proofs that the maths is the peers': loss curves against transformers and against our references."""
