"""Training runs on disk: from a config to an adapter, resumable at any step."""
