"""Requests out, answers in: prompts, clients, limits, money, and the ledger that records every request."""
