"""Fixtures of the museum's tests: the record of outcomes, and tiny models of ours and of transformers with one set of
weights.

Every weight is N(0, 0.25) (norms 1 + that), so that logits are of the order of 1 to 10 and an error shows as 1.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from minipeft.data.packing import Batch
from minipeft.data.tokens import Tokenizer, load_tokenizer
from minipeft.models.checkpoint import load_model
from tests.museum.exhibits import PAGE, WRITER, Exhibit, label_of, render_row
from tests.museum.twins import Twins
from tests.small import TOKENS, write_tokenizer

logging.getLogger("transformers").setLevel(logging.ERROR)

GPT2 = {"n_positions": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 96, "bos_token_id": None, "eos_token_id": 0,
         "pad_token_id": None}  # fmt: skip


FAILED = pytest.StashKey[bool]()


@pytest.fixture
def exhibit(request: pytest.FixtureRequest) -> Iterator[Exhibit]:
    """The record of this test; afterwards the committed page must show the same outcomes."""
    record = Exhibit()
    yield record
    if request.node.stash.get(FAILED, False):
        return
    cluster = Path(request.node.path).stem.removeprefix("test_")
    label = label_of(request.node.name, cluster, request.node.obj.__doc__ or "")
    row = render_row(label, record.ours, record.peers)
    request.node.user_properties.append(("museum", (label.test, record.ours, record.peers)))
    if not request.config.pluginmanager.has_plugin(WRITER):
        held = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.exists() else []
        assert row in held, f"docs/museum.md has no such row; run tests/museum/write_page.py\n{row}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    """Remember whether the test itself failed: its outcomes are not compared then."""
    report = yield
    if call.when == "call":
        item.stash[FAILED] = report.outcome != "passed"
    return report


@pytest.fixture
def twins(tmp_path: Path) -> Callable[..., Twins]:
    """Makes twins of a family; `changes` go over its config."""
    made = 0

    def make(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: object) -> Twins:
        nonlocal made
        made += 1
        given = {"vocab_size": TOKENS} | (GPT2 if family == "gpt2" else LLAMA) | changes
        config = transformers.models.auto.configuration_auto.CONFIG_MAPPING[family](**given)
        theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in theirs.named_parameters():
                p.normal_(0, 0.25, generator=generator)
                if p.ndim == 1 and name.endswith("weight"):  # a norm's
                    p.add_(1)
        theirs = theirs.to(dtype)
        folder = tmp_path / f"model{made}"
        theirs.save_pretrained(folder)
        write_tokenizer(folder)
        return Twins(load_model(folder), theirs, folder)

    return make


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """A byte-level tokenizer without merges; id 0 is EOS, and a byte is a token."""
    write_tokenizer(tmp_path)
    return load_tokenizer(tmp_path)


@pytest.fixture
def ids() -> Tensor:
    """Two rows of 24 random ids, none of them EOS."""
    return torch.randint(1, TOKENS, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def batch(ids: Tensor) -> Batch:
    """The two rows as a batch, each to be predicted from its second token on."""
    labels = ids.clone()
    labels[:, 0] = -100
    return Batch(ids, labels, torch.zeros_like(ids))


@pytest.fixture
def stir() -> Callable[[nn.Module], None]:
    """Adds noise to the trainable parameters: an adapter at its init hides errors."""

    def add_noise(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape, generator=generator))

    return add_noise


@pytest.fixture
def apart() -> Callable[[Tensor, Tensor], float]:
    """max |a - b| / max |b|"""
    return lambda a, b: float((a.double() - b.double()).abs().max() / b.double().abs().max())
