"""Metadata is in pyproject.toml. Compiled parts (csrc/) are built from here; this version has none."""

from setuptools import setup

setup()
