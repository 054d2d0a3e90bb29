"""Prefix and prompt under packing, padding, the cache, activation checkpointing, casts, and on disk.

Each kind stands in GPT-2, Llama with grouped queries, Mistral with a window (6) shorter than its texts, and in the
trained weights of stories260K, as Llama and as a Mistral with a window of 16.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft.adapters import PrefixConfig, PromptConfig, add_adapter, remove_adapter
from minipeft.adapters.peft_format import load_adapter, save_adapter
from minipeft.adapters.peft_virtual import OWN, STATE
from minipeft.adapters.virtual import encode_to_length, run_text
from minipeft.data.packing import Batch
from minipeft.documents import PADDING
from minipeft.errors import InputError
from minipeft.models import Decoder
from minipeft.models.checkpoint import load_model
from minipeft.training.loop import TrainConfig, train

TEXT = "abracadabra"
KINDS = {
    "prefix": PrefixConfig(5, text=TEXT),
    "prefix mlp": PrefixConfig(5, text=TEXT, reparam=6),
    "prefix first": PrefixConfig(5, text=TEXT, freeze_first=True, reparam=6),
    "prefix gate": PrefixConfig(5, text=TEXT, gate=True),
    "prefix gate mlp": PrefixConfig(5, text=TEXT, gate=True, reparam=6),
    "prefix windowed": PrefixConfig(5, text=TEXT, windowed=True),
    "prompt": PromptConfig(5, text=TEXT),
    "prompt mlp": PromptConfig(5, text=TEXT, reparam=6),
    "prompt windowed": PromptConfig(5, text=TEXT, windowed=True),
}
BASES = ("gpt2", "llama", "mistral", "stories", "stories mistral")
COMBINED = ("prefix first", "prefix gate mlp")  # of what stands alone elsewhere: on one base
CASES = [
    (base, kind) for base in BASES for kind in KINDS
    if kind not in COMBINED and ("windowed" not in kind or "mistral" in base)
]  # fmt: skip
ONE_BASE = [("llama", kind) for kind in KINDS]
everywhere = pytest.mark.parametrize("case", CASES, ids=" ".join, indirect=True)
on_one_base = pytest.mark.parametrize("case", ONE_BASE, ids=" ".join, indirect=True)


class Letters:
    """A tokenizer for the tiny models: a letter is a token."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 61 for letter in text]


def base_model(base: str, decoder, assets: Path, folder: Path) -> Decoder:
    """A decoder of that name, without an adapter."""
    if not base.startswith("stories"):
        return decoder(base)
    source = assets / "fixtures" / "stories260K"
    if base == "stories mistral":
        config = json.loads((source / "config.json").read_text())
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 16}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
        source = folder
    return load_model(source, dtype=torch.float32)


@pytest.fixture
def plain(case, decoder, assets, tmp_path) -> Decoder:
    """The base alone."""
    return base_model(case[0], decoder, assets, tmp_path)


@pytest.fixture
def case(request) -> tuple[str, str]:
    return request.param


@pytest.fixture
def config(case) -> PrefixConfig | PromptConfig:
    return KINDS[case[1]]


@pytest.fixture
def model(plain, config, stir) -> Decoder:
    """The base with an adapter away from its init."""
    add_adapter(plain, config, Letters())
    return stir(plain)


@everywhere
def test_packed_is_separate(model, packed, separate, gradients, apart):
    loss, of_packed = gradients(model, [packed])
    loss_alone, of_separate = gradients(model, separate)
    assert loss == pytest.approx(loss_alone, rel=1e-5)
    for name, gradient in of_separate.items():
        assert apart(of_packed[name], gradient) < 1e-5, name


@everywhere
def test_recomputed_gradients_are_the_same_bits(model, packed, gradients):
    model.train()
    loss, kept = gradients(model, [packed])
    model.activation_checkpointing = True
    loss_again, recomputed = gradients(model, [packed])
    assert loss_again == loss
    for name, gradient in kept.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(recomputed[name], gradient), name


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    documents = torch.stack([F.pad(torch.zeros_like(r), (width - len(r), 0), value=PADDING) for r in rows])
    return torch.stack([F.pad(r, (width - len(r), 0), value=3) for r in rows]), documents


@everywhere
@torch.no_grad()
def test_left_padded_is_alone_and_cached_is_uncached(model, documents, apart):
    rows = [torch.cat(documents)[:n] for n in (2, 29, 7, 1)]
    ids, owners = left_padded(rows)
    together = model(ids, owners)
    for row, logits in zip(rows, together):
        assert apart(logits[-len(row) :], model(row[None])[0]) < 1e-5
    cache, parts = model.new_cache(len(rows), ids.shape[1]), []
    for start, stop in [(0, 7), (7, 12), *((t, t + 1) for t in range(12, ids.shape[1]))]:
        parts.append(model(ids[:, start:stop], owners[:, start:stop], cache))
    assert apart(torch.cat(parts, dim=1)[owners >= 0], together[owners >= 0]) < 1e-5


@everywhere
def test_everything_trainable_moves_after_an_evaluation_pass_and_nothing_else(plain, config, packed):
    add_adapter(plain, config, Letters())
    before = {name: t.clone() for name, t in plain.state_dict().items()}
    trained = {name for name, p in plain.named_parameters() if p.requires_grad}
    plain.eval()(packed.ids)
    for _ in train(plain, [packed] * 3, TrainConfig(steps=3, learning_rate=1e-2)):
        plain.eval()(packed.ids)
    for name, tensor in plain.state_dict(keep_vars=True).items():
        moved = not torch.equal(tensor, before[name])
        shared = any(tensor is p for n, p in plain.named_parameters() if n in trained)
        assert moved == shared, name


@pytest.mark.parametrize(
    "case", [("mistral", "prefix"), ("stories mistral", "prefix mlp")], ids=" ".join, indirect=True
)
def test_mistral_with_a_prefix_learns(plain, config, packed, gradients):
    """The paper's missing cell (Mistral, prefix), on texts longer than the window."""
    add_adapter(plain, config, Letters())
    before, _ = gradients(plain, [packed])
    for _ in train(plain, [packed] * 20, TrainConfig(steps=20, learning_rate=2e-2)):
        pass
    after, _ = gradients(plain, [packed])
    assert after < before - 0.5


@everywhere
@torch.no_grad()
def test_the_columns_are_all_that_is_needed(plain, config, model, ids, tmp_path):
    wanted = model(ids)
    save_adapter(model, tmp_path / "adapter")
    for name in (OWN, STATE):  # what HF PEFT does not read
        (tmp_path / "adapter" / name).unlink(missing_ok=True)
    remove_adapter(model)
    load_adapter(model, tmp_path / "adapter")
    model.windowed = config.windowed  # without our file an adapter is PEFT's, and a window hides PEFT's
    assert torch.equal(model(ids), wanted)


@on_one_base
def test_stays_float32_to_the_bit_through_casts(model, config, ids):
    kept = {name: t.clone() for name, t in model.state_dict().items() if "prefix" in name or "prompt" in name}
    model.to(torch.bfloat16)
    for name, tensor in kept.items():
        assert torch.equal(model.state_dict()[name], tensor), name
        assert model.state_dict()[name].dtype == torch.float32
    assert model(ids).dtype == torch.bfloat16
    assert model.float()(ids).dtype == torch.float32


@on_one_base
def test_a_deep_copy_is_equal_and_shares_nothing(model, ids, stir):
    again = copy.deepcopy(model)
    with torch.no_grad():
        wanted = model(ids)
        assert torch.equal(again(ids), wanted)
        stir(again)
        assert not torch.equal(again(ids), wanted)
        assert torch.equal(model(ids), wanted)


@on_one_base
def test_removal_leaves_no_trace(case, decoder, model, ids):
    remove_adapter(model)
    fresh = decoder(case[0])
    assert repr(model) == repr(fresh)
    assert model.state_dict().keys() == fresh.state_dict().keys()
    assert torch.equal(model(ids), fresh(ids))
    assert (model.virtual_tokens, model.windowed) == (0, False)


@on_one_base
def test_the_meta_device_counts_alike(case, config, decoder, model):
    held = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    bare = decoder(case[0]).to("meta")
    add_adapter(bare, config)
    assert {name: p.shape for name, p in bare.named_parameters() if p.requires_grad} == held


@on_one_base
def test_a_longer_text_than_the_context_is_refused_before_training(case, config, decoder):
    model = decoder("gpt2", n_positions=24)
    add_adapter(model, config, Letters())
    ids = torch.zeros(1, 20, dtype=torch.long)
    batch = Batch(ids, ids, torch.zeros_like(ids))
    if model.virtual_tokens == 0:  # a gated prefix takes no column
        next(train(model, [batch], TrainConfig(steps=1)))
        return
    with pytest.raises(InputError, match=r"position 24, but the model's context is 24, of which 5 are virtual tokens"):
        next(train(model, [batch], TrainConfig(steps=1)))
    remove_adapter(model)
    with pytest.raises(InputError, match=r"23 virtual tokens leave no room in a context of 24.*at most 22"):
        add_adapter(model, type(config)(23, text=TEXT), Letters())


class WithBOS(Letters):
    """As Letters, with a BOS before each text."""

    bos = 60

    def encode(self, text: str) -> list[int]:
        return [self.bos, *super().encode(text)]


@pytest.mark.parametrize("length", [2, 3, 4, 5, 9])
def test_a_text_is_repeated_without_its_bos(length):
    ids = encode_to_length("abc", length, WithBOS(), "prefix")
    assert ids == [60, *Letters().encode("abcabcabc")][:length]
    assert encode_to_length("abc", length, Letters(), "prefix") == Letters().encode("abcabcabcabc")[:length]
    with pytest.raises(InputError, match="text: '' has no tokens"):
        encode_to_length("", length, WithBOS(), "prefix")


@pytest.mark.parametrize("windowed", [False, True])
def test_a_text_that_cannot_be_run_leaves_the_model_as_it_was(decoder, windowed):
    model = decoder("gpt2").train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(InputError, match="n_positions=96"):
        run_text(model, [1] * 97, windowed=not windowed)
    assert [module.training for module in model.modules()] == modes
    model.windowed = windowed
    run_text(model, [1] * 5, windowed=not windowed)
    assert model.windowed is windowed
    assert [module.training for module in model.modules()] == modes
