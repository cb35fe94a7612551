"""Comparison: benchmarks, evaluation of checkpoints, and their reports. Reads checkpoint folders, never train/."""
