"""The paper's numbers."""

from minipeft.study.paper import MODELS, reported


def test_the_papers_numbers_stand_beside_its_models():
    assert reported(MODELS["GPT-2"], "prefix") == {"bleu": 0.00035, "codebleu": 0.25, "percent": 0.30, "memory": 5.85}
    assert reported("demo", "prefix") == {}
    assert reported(MODELS["GPT-2"], "zero-shot") == {}
