"""From rows to a trained adapter on disk."""
