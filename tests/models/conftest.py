"""Fixtures of the model tests: tiny random decoders and transformers' own, from one folder on disk.

Every parameter is N(0, 0.25) (norms 1 + that), so that logits are of the order of 1 to 10 and a wrong mask, position
or head shows as 1, not as 1e-3.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from minipeft.models import FAMILIES
from minipeft.models.checkpoint import load_model

transformers.logging.set_verbosity_error()

GPT2 = {"vocab_size": 61, "n_positions": 96, "n_embd": 32, "n_layer": 3, "n_head": 4,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
LLAMA = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 96}  # fmt: skip
WINDOWED = LLAMA | {"sliding_window": 6, "pad_token_id": None}
TINY: dict[str, dict[str, Any]] = {**dict.fromkeys(FAMILIES, WINDOWED), "gpt2": GPT2, "llama": LLAMA}


class Twins:
    """Makes a transformers model of tiny random weights, and ours from the folder that it saves."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.made = 0

    def peer(self, family: str, seed: int = 0, **changes: object) -> nn.Module:
        """A transformers model in eval mode; `changes` go over the family's TINY config."""
        config = transformers.models.auto.configuration_auto.CONFIG_MAPPING[family](**{**TINY[family], **changes})
        torch.manual_seed(seed)
        peer = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for name, p in peer.named_parameters():
                p.normal_(0, 0.25)
                if p.ndim == 1 and name.endswith("weight"):  # a norm's
                    p.add_(1)
        return peer

    def save(self, peer: nn.Module) -> Path:
        """A new folder as transformers writes it."""
        self.made += 1
        folder = self.folder / f"peer{self.made}"
        peer.save_pretrained(folder)
        return folder

    def __call__(self, family: str, seed: int = 0, **changes: object) -> tuple[nn.Module, nn.Module]:
        """(ours, theirs), of the same weights, in eval mode."""
        peer = self.peer(family, seed, **changes)
        return load_model(self.save(peer)), peer


@pytest.fixture
def twins(tmp_path: Path) -> Twins:
    return Twins(tmp_path)


@pytest.fixture
def ids() -> Tensor:
    """Two rows of 30 random ids."""
    return torch.randint(0, 61, (2, 30), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def apart() -> Callable[[nn.Module, nn.Module, Tensor], float]:
    """max |ours - theirs| / max |theirs| of the logits."""

    def measure(ours: nn.Module, theirs: nn.Module, ids: Tensor) -> float:
        with torch.no_grad():
            wanted = theirs(ids).logits
            return float((ours(ids) - wanted).abs().max() / wanted.abs().max())

    return measure


@pytest.fixture
def greedy() -> Callable[[nn.Module, Tensor, int], Tensor]:
    """The likeliest continuation of ids [1, T], one token at a time with the decode cache. -> [1, T + count]"""

    def decode(model: nn.Module, ids: Tensor, count: int) -> Tensor:
        cache = model.new_cache(1, ids.shape[1] + count)
        step = ids
        with torch.no_grad():
            for _ in range(count):
                step = model(step, cache=cache)[:, -1:].argmax(dim=-1)  # [1, 1]
                ids = torch.cat([ids, step], dim=1)
        return ids

    return decode


@pytest.fixture
def peer_greedy() -> Callable[[nn.Module, Tensor, int], Tensor]:
    """The same by transformers' generate."""

    def decode(peer: nn.Module, ids: Tensor, count: int) -> Tensor:
        config = transformers.GenerationConfig(
            do_sample=False, max_new_tokens=count, eos_token_id=None, bos_token_id=None, pad_token_id=0
        )
        return peer.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)

    return decode
