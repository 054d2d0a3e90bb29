"""The exercises, one file each; record.py gives their order."""
