"""A trained model at work."""

from mnist_exp.serving.classifier import Classifier, Predictions

__all__ = ["Classifier", "Predictions"]
