"""Experiments with a squeeze-excitation CNN on MNIST."""

import os

# torch's threads (libgomp) wait for each other by spinning: beside two busy programs a run took 9 times as long, with this limit
# 3 times (docs/benchmarks.md). libgomp reads it when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
