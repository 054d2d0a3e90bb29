"""Scores of texts against texts; knows no tensor."""
