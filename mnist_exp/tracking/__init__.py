"""Runs in MLflow: written, read, and exported as models."""
