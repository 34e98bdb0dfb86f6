"""Whole outputs, kept in __snapshots__ beside the tests and read by people: what changes in one shows in a diff.

A test says `assert text == snapshot`. After a wanted change, `pytest -n 0 FILE --snapshot-update` writes them anew:
read the diff before it is committed.
"""

import re

from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode

FRACTION = re.compile(r"\d+\.\d+(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+")


class Text(SingleFileSnapshotExtension):
    """One text of UTF-8 a snapshot, equal to the letter."""

    file_extension = "txt"
    _write_mode = WriteMode.TEXT


class Close(Text):
    """A text whose numbers with a point or an exponent may be off by a thousandth, as sums differ between processors;
    all else is equal to the letter."""

    def matches(self, *, serialized_data, snapshot_data):
        """Return whether two texts say the same."""
        ours, theirs = (FRACTION.findall(text) for text in (serialized_data, snapshot_data))
        if FRACTION.sub("#", serialized_data) != FRACTION.sub("#", snapshot_data):
            return False
        return all(abs(float(a) - float(b)) <= 1e-3 * abs(float(b)) for a, b in zip(ours, theirs, strict=True))
