"""A tiny squeeze-excitation CNN on MNIST: composed by Hydra, recorded by MLflow."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the repository
