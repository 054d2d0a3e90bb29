"""Training: from rows to trained tensors."""
