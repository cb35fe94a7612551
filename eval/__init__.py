"""Evaluation: comparison, analyses, benchmarks, demo. Reads checkpoint folders; imports nothing of train/."""

import os

# Before torch is loaded: on a busy CPU, OpenMP's threads otherwise spin for one another; a step took 30 times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
