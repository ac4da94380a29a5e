"""A tiny squeeze-excitation CNN on MNIST: composed by Hydra, recorded by MLflow."""
