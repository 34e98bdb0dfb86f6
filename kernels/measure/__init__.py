"""Measurements of the kernels: cases, peers, checks against the reference, the clock, plots and the tuner."""
