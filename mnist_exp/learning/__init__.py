"""The science: data, model, training and evaluation."""
