"""Compiled code of csrc: which compilers build it, where the libraries lie, how they are loaded and called."""
