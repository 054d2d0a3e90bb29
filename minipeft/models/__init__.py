"""From rows of ids to logits; knows no adapter."""
