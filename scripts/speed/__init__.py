"""Speeds that a CPU can measure."""
