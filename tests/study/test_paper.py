"""The paper's numbers."""

from minipeft.study.paper import MODELS, find_reported


def test_the_papers_numbers_stand_beside_its_models():
    assert find_reported(MODELS["GPT-2"], "prefix") == {
        "bleu": 0.00035,
        "codebleu": 0.25,
        "percent": 0.30,
        "memory": 5.85,
    }
    assert find_reported("demo", "prefix") == {}
    assert find_reported(MODELS["GPT-2"], "zero-shot") == {}
