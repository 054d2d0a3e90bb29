"""The demo model, its tokenizer and rows for the stops: what each of them starts from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from minipeft.adapters import add_adapter
from minipeft.data.examples import Pair, encode_pairs, load_pairs
from minipeft.data.packing import Batches, pack
from minipeft.data.tokens import Tokenizer, load_tokenizer
from minipeft.models import Decoder
from minipeft.models.checkpoint import load_model
from minipeft.models.loss import count_targets
from minipeft.training.loop import Step, TrainConfig, train

LENGTH = 160  # tokens of a row
TRAINED_PAIRS, HELD_OUT_PAIRS = 400, 18


class Bench:
    """A fresh demo model for each experiment; data are read once. `quick`: fewer steps and pairs, shorter rows."""

    def __init__(self, quick: bool = False):
        self.quick = quick
        self.length = 96 if quick else LENGTH  # of the rows that are trained on
        self.held_out_pairs = 6 if quick else HELD_OUT_PAIRS

    def model(self, dtype: torch.dtype = torch.float32) -> Decoder:
        """The demo model, in eval mode."""
        return load_model("demo", dtype=dtype).eval()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer("demo")

    @cached_property
    def pairs(self) -> list[Pair]:
        return list(load_pairs("demo"))

    def pack(self, pairs: Sequence[Pair], virtual_tokens: int = 0, **how: Any) -> Batches:
        """Pack pairs into rows of LENGTH tokens, one row a batch, with the loss on the response."""
        given = {"length": LENGTH, "batch": 1, "loss_mask": "response", **how}
        examples = encode_pairs(pairs, self.tokenizer)
        return pack(examples, self.tokenizer, virtual_tokens=virtual_tokens, **given)

    def tune(self, adapter: Any, steps: int, learning_rate: float) -> tuple[Decoder, list[Step]]:
        """Train an adapter on a fresh demo model; returns the tuned model and its steps."""
        model = self.model()
        add_adapter(model, adapter, self.tokenizer)
        batches = self.pack(self.pairs[:TRAINED_PAIRS], model.virtual_tokens, length=self.length)
        steps = max(6, steps // 6) if self.quick else steps
        done = list(train(model, batches, TrainConfig(steps=steps, learning_rate=learning_rate)))
        return model.eval(), done

    @torch.no_grad()
    def held_out_loss(self, model: Decoder) -> float:
        """Nats per supervised token on pairs that `tune` does not train on."""
        batches = self.pack(self.pairs[-self.held_out_pairs :], model.virtual_tokens)
        total = sum(model.loss(batch.ids, batch.labels, batch.documents).item() for batch in batches)
        return total / sum(count_targets(batch.labels) for batch in batches)
