"""Scores of predicted texts against reference texts. `scores.score_texts` computes all of them."""
