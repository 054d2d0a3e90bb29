"""A run: one training on disk, from a config to an adapter, resumable at any moment."""
