"""DoRA's row norms against W + sBA formed in float64, and that no tensor of that size is allocated."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minipeft.adapters import LoRAConfig, add_adapter
from minipeft.adapters.dora import compute_row_norms
from minipeft.adapters.lora import find_lora_layers


class Sizes(TorchDispatchMode):
    """Remembers the largest tensor that an operation made, views apart."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.largest = max(self.largest, out.numel())
        return out


class TestDora:
    def test_the_norm_is_that_of_the_sum_and_makes_nothing_as_large(self, monkeypatch):
        torch.manual_seed(0)
        W, A, B = torch.randn(300, 200), torch.randn(4, 200), torch.randn(300, 4)
        with Sizes() as made:
            norms = compute_row_norms(W, A, B, 0.7)
        wanted = (W.double() + 0.7 * B.double() @ A.double()).norm(dim=1)
        torch.testing.assert_close(norms.double(), wanted, rtol=1e-5, atol=0)
        assert made.largest == B.numel()
        monkeypatch.setattr("minipeft.adapters.dora.BLOCK", 64)
        half = W.bfloat16()
        with Sizes() as made:
            narrow = compute_row_norms(half, A, B, 0.7)
        torch.testing.assert_close(narrow, compute_row_norms(half.float(), A, B, 0.7), rtol=1e-5, atol=0)
        assert made.largest == 64 * 200

    def test_a_trained_length_is_the_merged_rows_length(self, decoder, stir):
        model = decoder("gpt2")
        add_adapter(model, LoRAConfig(rank=4, alpha=8.0, dora=True))
        for layer in find_lora_layers(stir(model)).values():
            torch.testing.assert_close(layer.merged()[0].norm(dim=1), layer.lora_magnitude_vector, rtol=1e-5, atol=1e-5)
