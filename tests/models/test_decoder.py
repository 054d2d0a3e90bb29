"""Decoder.loss: with labels, and on the meta device."""

import pytest
import torch
import torch.nn.functional as F

from minipeft.models import FAMILIES
from minipeft.models.loss import count_targets

PACKED = torch.tensor([[0] * 9 + [1] + [2] * 14 + [-1] * 6, [0] * 12 + [1] * 18])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_cross_entropy_of_the_logits(twins, ids, family):
    model = twins(family)[0]
    labels = ids.masked_fill(PACKED < 0, -100)
    labels[:, 0] = -100
    loss = model.loss(ids, labels, PACKED)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(ids, PACKED)[:, :-1].flatten(0, 1)
    want = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert loss.item() / count_targets(labels) > 1, "the control: a random model knows nothing"
    for name, p in model.named_parameters():
        assert (found[name] - p.grad).abs().max() <= 2e-5 * p.grad.abs().max(), name


def test_on_the_meta_device_every_token_counts(ids):
    """Labels have no values there; planning counts a step's memory so."""
    family = FAMILIES["llama"]
    with torch.device("meta"):
        model = family.decoder(family.config(vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    loss = model.loss(ids.to("meta"), ids.to("meta"))
    loss.backward()
    assert loss.shape == ()
    assert model.embedding.weight.grad.shape == (61, 32)
