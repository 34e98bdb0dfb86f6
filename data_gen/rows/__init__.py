"""Answers to rows: parsing, defects, duplicates, contamination."""
