"""Weighted sums of LoRA pairs against dense matrices in float64; whole adapters against PEFT's: test_switching.py."""

import pytest
import torch

from minipeft.adapters.combine import WAYS, Term, average, compute_squared_errors, concatenate, truncate
from minipeft.errors import InputError


def drawn(*ranks, out=13, width=9):
    """Terms of these ranks with factors of both signs, and their sum U."""
    draw = torch.Generator().manual_seed(sum(ranks))
    made = lambda *shape: torch.randn(*shape, generator=draw)
    terms = [Term((-0.7) ** i * 1.3, made(rank, width), made(out, rank)) for i, rank in enumerate(ranks)]
    return terms, sum(term.factor * term.B.double() @ term.A.double() for term in terms)


@pytest.mark.parametrize("rank", [1, 3, 5, 11, None])
def test_svd_is_the_best_approximation_of_its_rank(rank):
    terms, whole = drawn(2, 5, 3)
    A, B = truncate(terms, rank)
    rank = rank or 5
    assert (A.shape, B.shape) == ((rank, 9), (13, rank))
    error = torch.linalg.matrix_norm(B.double() @ A.double() - whole)
    best = torch.linalg.svdvals(whole)[rank:].square().sum().sqrt()  # Eckart & Young
    torch.testing.assert_close(error, best, rtol=1e-4, atol=1e-4)


def test_cat_is_exact():
    terms, whole = drawn(2, 5, 3)
    A, B = concatenate(terms, None)
    assert len(A) == 10
    torch.testing.assert_close(B.double() @ A.double(), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_the_stated_error_is_that_of_the_dense_matrices(way):
    terms, whole = drawn(4, 4)
    A, B = pair = WAYS[way](terms, None)
    missed, size = compute_squared_errors(terms, pair)
    assert missed == pytest.approx(float((B.double() @ A.double() - whole).square().sum()), rel=1e-3, abs=1e-9)
    assert size == pytest.approx(float(whole.square().sum()), rel=1e-6)


def test_linear_takes_one_rank():
    with pytest.raises(
        InputError, match=r"linear: adds matrices of one rank, and these have \[2, 3\]\. Combine them by"
    ):
        average(drawn(2, 3)[0], None)
