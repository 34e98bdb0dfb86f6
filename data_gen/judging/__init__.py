"""Answers of several models compared in pairs: by a judge over an API, and by people."""
