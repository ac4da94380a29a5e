"""Runs in MLflow: written, read, and exported as models."""

from mnist_exp.tracking.frames import frame

__all__ = ["frame"]
