"""The HTML report about a dataset."""
