"""Measurements of engine.serve from outside: other people's clients, hostile crowds, and other servers beside it."""
