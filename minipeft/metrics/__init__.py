"""Scores of texts against texts; knows no tensor. `text.score_texts` gives all of them at once."""
