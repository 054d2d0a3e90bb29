"""The decode cache: keep_rows, and the error for too many columns. test_attention.py checks its values."""

import pytest
import torch

from minipeft.errors import InputError


def test_a_cache_keeps_the_rows_that_are_named(twins, ids):
    model = twins("mistral")[0]
    ids = torch.cat([ids, ids.flip(1)])  # [4, 30]
    cache = model.new_cache(4, 32)
    with torch.no_grad():
        model(ids[:, :29], cache=cache)
        cache.keep_rows([3, 0])
        kept = model(ids[[3, 0], 29:], cache=cache)  # [2, 1, V]
        assert torch.allclose(kept[:, 0], model(ids[[3, 0]])[:, -1], atol=1e-4)


def test_without_room_it_says_how_to_make_it(twins, ids):
    model = twins("llama")[0]
    cache = model.new_cache(2, 29)
    says = r"cache: 2 rows of 0 \+ 30 columns do not fit in one of 2 rows and 29 columns\. make it with model\.new"
    with pytest.raises(InputError, match=says):
        model(ids, cache=cache)
    with pytest.raises(InputError, match="cache: 1 rows of 0"):
        model(ids[:1, :5], cache=cache)
