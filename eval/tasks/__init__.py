"""Benchmarks: lmms-eval's and the built-in ones."""
