"""Measurements, proofs and generated pages. Nothing that the project runs on imports them."""
