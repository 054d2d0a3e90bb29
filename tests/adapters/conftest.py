"""Fixtures of the adapter tests: tiny random decoders of each family, and an adapter away from its init.

Every weight is N(0, 0.25) (norms 1 + that), so that logits are of the order of 1 to 10 and a wrong scale, mask or
position shows as 1, not as 1e-3.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from minipeft.data.packing import Batch
from minipeft.models import FAMILIES
from minipeft.models.checkpoint import save_model
from minipeft.models.loss import count_targets, cross_entropy

GPT2 = {"vocab_size": 61, "n_positions": 96, "n_embd": 32, "n_layer": 3, "n_head": 4,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
LLAMA = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 96}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {"gpt2": GPT2, "llama": LLAMA, "mistral": LLAMA | {"sliding_window": 6}}


@pytest.fixture(params=list(TINY))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def decoder() -> Callable[..., nn.Module]:
    """Makes a tiny decoder of random weights in eval mode; `changes` go over the family's TINY config."""

    def make(family: str, seed: int = 0, **changes: object) -> nn.Module:
        config, model = FAMILIES[family].config, FAMILIES[family].decoder
        made = model(config(**{**TINY[family], **changes})).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in made.named_parameters():
                p.normal_(0, 0.25, generator=generator)
                if p.ndim == 1 and name.endswith("weight"):  # a norm's
                    p.add_(1)
        return made

    return make


@pytest.fixture
def model(decoder: Callable[..., nn.Module], family: str) -> nn.Module:
    """A tiny decoder of each family in turn."""
    return decoder(family)


@pytest.fixture
def twin(tmp_path: Path) -> Callable[[nn.Module], nn.Module]:
    """Makes transformers' model of the same weights, from the folder `base` that our model is saved to."""

    def make(model: nn.Module) -> nn.Module:
        save_model(model, tmp_path / "base")
        read = transformers.AutoModelForCausalLM.from_pretrained
        return read(tmp_path / "base", attn_implementation="eager").eval()

    return make


@pytest.fixture
def stir() -> Callable[..., nn.Module]:
    """Adds noise to everything trainable, as training would: an adapter at its init has no effect."""

    def add_noise(model: nn.Module, scale: float = 0.1, seed: int = 7) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=generator) * scale)
        return model

    return add_noise


@pytest.fixture
def ids() -> Tensor:
    """Two rows of 30 random ids."""
    return torch.randint(0, 61, (2, 30), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def documents() -> list[Tensor]:
    """Five documents of 3 to 11 random ids; together with 2 columns of padding a row of 36."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 61, (n,), generator=generator) for n in (7, 11, 3, 5, 8)]


@pytest.fixture
def packed(documents: list[Tensor]) -> Batch:
    """The documents in one row, each to be predicted from its second token on, two columns of padding at the end."""
    labels = [torch.cat([torch.tensor([-100]), d[1:]]) for d in documents]
    owners = [torch.full_like(d, i) for i, d in enumerate(documents)]
    pad = lambda parts, filling: torch.cat([*parts, torch.full((2,), filling)])[None]  # [1, 36]
    return Batch(pad(documents, 5), pad(labels, -100), pad(owners, -1))


@pytest.fixture
def separate(documents: list[Tensor]) -> list[Batch]:
    """The same documents, each in a row of its own."""
    rows = [(d[None], torch.cat([torch.tensor([-100]), d[1:]])[None]) for d in documents]
    return [Batch(ids, labels, torch.zeros_like(ids)) for ids, labels in rows]


@pytest.fixture
def gradients() -> Callable[[nn.Module, list[Batch]], tuple[float, dict[str, Tensor]]]:
    """Loss per target and the gradient of everything trainable, of some batches together."""

    def measure(model: nn.Module, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
        model.zero_grad(set_to_none=True)
        targets = sum(count_targets(batch.labels) for batch in batches)
        total = 0.0
        for batch in batches:
            hidden = model.hidden(batch.ids, batch.documents)
            loss = cross_entropy(hidden, model.lm_head.weight, batch.labels) / targets
            loss.backward()
            total += loss.item()
        return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    return measure


@pytest.fixture
def apart() -> Callable[[Tensor, Tensor], float]:
    """max |a - b| / max |b|"""
    return lambda a, b: float((a - b).abs().max() / b.abs().max())
