"""The nucleus: against its definition, at its edges, and from the first candidates as from all tokens."""

import pytest
import torch
import torch.nn.functional as F

from minipeft.sampling import choose, draw_uniforms, sort_best


def test_the_nucleus_is_drawn_from_by_probability():
    """Against the definition, token by token: the fewest likeliest tokens that hold top_p, renormalised."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 12, generator=generator) * 2
    p = (logits[0] / 0.7).softmax(0)
    kept, mass = {}, 0.0
    for token in sorted(range(12), key=lambda t: -p[t]):
        if mass >= 0.8:
            break
        kept[token], mass = p[token].item(), mass + p[token].item()
    draws = torch.linspace(0, 1, 20_001)[:-1]
    chosen = choose(logits.expand(len(draws), -1), draws, 0.7, 0.8)
    counts = torch.bincount(chosen, minlength=12) / len(draws)
    for token in range(12):
        assert counts[token].item() == pytest.approx(kept.get(token, 0.0) / mass, abs=2e-4)


@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.5, 2), (0.75, 3), (0.7500001, 4), (1.0, 4), (1e-6, 1)])
def test_the_nucleus_ends_where_it_holds_top_p(top_p, kept):
    """Four tokens of a quarter each, exactly: the fewest that hold 0.5 are two, not three."""
    draws = torch.linspace(0, 1, 1001)[:-1]
    chosen = choose(torch.zeros(len(draws), 4), draws, 1.0, top_p)
    assert chosen.unique().tolist() == list(range(kept))
    assert torch.bincount(chosen).tolist() == pytest.approx([1000 / kept] * kept, abs=1)


def test_the_nucleus_is_the_same_from_the_first_candidates_and_from_all(monkeypatch):
    """Peaked and flat rows, ties within and across the last candidate."""
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randn(400, generator=draw) * size for size in (0.01, 1, 3, 10, 50) for _ in range(8)]
    rows += [(torch.randn(400, generator=draw) * size).round() for size in (1, 2, 5) for _ in range(8)]
    full = 0
    for logits in rows:
        draws = torch.rand(50, generator=draw)
        many = logits.expand(50, 400)
        chosen = choose(many, draws, 1.0, 0.9)
        monkeypatch.setattr("minipeft.sampling.CANDIDATES", 400)
        assert torch.equal(chosen, choose(many, draws, 1.0, 0.9))
        monkeypatch.setattr("minipeft.sampling.CANDIDATES", 64)
        full += sort_best(F.softmax(many, 1), 0.9)[0].shape[1] == 400
    assert 0 < full < len(rows)


def test_a_prompts_numbers_are_its_own():
    """They depend on seed and index, not on how many are drawn."""
    first = draw_uniforms(3, 1, 8)
    assert torch.equal(first[:5], draw_uniforms(3, 1, 5))
    assert not any(torch.equal(first, draw_uniforms(seed, number, 8)) for seed, number in ((3, 0), (4, 1)))


def test_at_temperature_0_the_likeliest_is_chosen():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert choose(logits, torch.tensor([0.9, 0.9]), 0, 0.95).tolist() == [1, 0]
