"""A run, from its settings to the written model."""
