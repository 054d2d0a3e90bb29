"""The embedded default: a small model and a data set of our own."""
