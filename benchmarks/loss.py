"""The loss from the hidden states, forward and backward, beside the logits as a whole, as transformers computes it.

    OMP_NUM_THREADS=1 python benchmarks/loss.py --out benchmarks/results/loss-cpu.json

1,024 tokens and the heads of GPT-2 124M and SmolLM2-135M, frozen and trained. `memory_bytes` is the peak beside the
inputs; the note gives the largest error of the gradients over their largest value,
against float64.
"""

import argparse
import dataclasses
from collections.abc import Callable

import measure
import torch
from torch import Tensor
from torch.nn import functional as F

from minipeft.models.loss import cross_entropy
from minipeft.models.products import fast_products

HEADS = {"GPT-2 124M": (50257, 768), "SmolLM2-135M": (49152, 576)}
TOKENS = 1024


def as_a_whole(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """All logits, in float32, and their cross-entropy, as transformers' ForCausalLMLoss."""
    logits = F.linear(hidden, weight).float()  # [1, T, V]
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="sum")


def main() -> None:
    """Measure each head and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser, rounds=5)
    options = parser.parse_args()
    rows = []
    for model, (vocabulary, width) in HEADS.items():
        for trained in (False, True):
            rows += compare(model, vocabulary, width, trained, options)
    measure.show_rows(rows)
    if options.out:
        measure.write_rows(options.out, rows)


def compare(model: str, vocabulary: int, width: int, trained: bool, options: argparse.Namespace) -> list[measure.Row]:
    """The rows of one head."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, TOKENS, width, generator=generator)
    weight = 0.02 * torch.randn(vocabulary, width, generator=generator)
    labels = torch.randint(vocabulary, (1, TOKENS), generator=generator)

    def run(loss: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        h, W = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(trained)
        return list(torch.autograd.grad(loss(h, W, labels), [h, W] if trained else [h]))

    def switched(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
        with fast_products():
            return run(loss)

    variants: dict[str, Callable[[], list[Tensor]]] = {
        "transformers": lambda: run(as_a_whole),
        "transformers, oneDNN": lambda: switched(as_a_whole),
        "minipeft, torch's products": lambda: run(cross_entropy),
        "minipeft": lambda: switched(cross_entropy),
    }
    h, W = hidden.double().requires_grad_(), weight.double().requires_grad_(trained)
    logits = F.linear(h, W)[0, :-1]
    exact = torch.autograd.grad(F.cross_entropy(logits, labels[0, 1:], reduction="sum"), [h, W] if trained else [h])
    errors = {
        v: max(((a.double() - b).abs().amax() / b.abs().amax()).item() for a, b in zip(call(), exact, strict=True))
        for v, call in variants.items()
    }
    del logits, exact, h, W
    rows = measure.measure(
        variants,
        name=f"loss, {'trained' if trained else 'frozen'} head",
        shape=f"{model}, {TOKENS} x {width} x {vocabulary}",
        dtype="float32",
        rounds=options.rounds,
        calls=1,
        warmups=1,
        threads=options.threads[0],
        busy=options.busy,
    )
    notes = [f"+{row.memory_bytes / 1e6:,.0f} MB; gradients off by {errors[row.variant]:.0e}" for row in rows]
    return [dataclasses.replace(row, note=note) for row, note in zip(rows, notes)]


if __name__ == "__main__":
    main()
