"""PiSSA's init against the singular values of the weight."""

import pytest
import torch

from minipeft.adapters import LoRAConfig, add_adapter
from minipeft.adapters.lora import find_lora_layers
from minipeft.errors import InputError


class TestPissa:
    def test_it_starts_from_the_largest_singular_values(self, decoder):
        model = decoder("llama")
        add_adapter(model, LoRAConfig(rank=4, alpha=8.0, init="pissa"))
        for layer in find_lora_layers(model).values():
            update = layer.scale * layer.lora_B.double() @ layer.lora_A.double()
            values = torch.linalg.svdvals(layer.weight.double())
            rest = torch.linalg.matrix_norm(layer.weight - update, 2)
            torch.testing.assert_close(rest, values[4], rtol=1e-5, atol=0)
            torch.testing.assert_close(torch.linalg.svdvals(update)[:4], values[:4], rtol=1e-5, atol=1e-5)

    def test_a_rank_beyond_the_singular_values_is_refused_before_anything_changes(self, decoder):
        model = decoder("llama")
        shown = repr(model)
        with pytest.raises(
            InputError, match=r"rank: 17 exceeds the 16 singular values of 'model\.layers\.0\.self_attn"
        ):
            add_adapter(model, LoRAConfig(rank=17, init="pissa"))
        assert repr(model) == shown
