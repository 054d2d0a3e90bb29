"""Prompt tuning: init; and HF PEFT's prompt, in the cases where it is right and wrong."""

import warnings

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from minipeft.adapters import PromptConfig, add_adapter, remove_adapter
from minipeft.adapters.peft_format import load_adapter, save_adapter
from minipeft.data.packing import Batch
from minipeft.errors import InputError
from minipeft.models.checkpoint import save_model

TEXT = "abracadabra"
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


class Letters:
    """A tokenizer for the tiny models: a letter is a token."""

    bos = 1

    def encode(self, text: str) -> list[int]:
        return [1, *(ord(letter) % 61 for letter in text)]


@pytest.fixture
def peer(model, tmp_path) -> nn.Module:
    """transformers' model of the same weights."""
    save_model(model, tmp_path / "base")
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()


@pytest.fixture
def both(model, peer, stir, tmp_path) -> tuple[nn.Module, nn.Module]:
    """(ours, PEFT's) with one prompt, through the files; as under PEFT a window hides the columns."""
    add_adapter(model, PromptConfig(5, text=TEXT, windowed=True), Letters())
    save_adapter(stir(model), tmp_path / "adapter")
    return model, peft.PeftModel.from_pretrained(peer, tmp_path / "adapter").eval()


# How it starts


def test_text_start_is_the_texts_embeddings_repeated_behind_its_bos(model):
    letters = Letters().encode(TEXT)
    for length in (1, 4, 12, 30):
        add_adapter(model, PromptConfig(length, text=TEXT), Letters())
        wanted = [letters[0], *(letters[1:][i % 11] for i in range(length - 1))]
        assert torch.equal(model.prompt.weight, model.embedding.weight[wanted])
        remove_adapter(model)


@pytest.mark.parametrize("reparam", [None, 7])
def test_vocab_start_is_embeddings_of_the_models_own_and_normal_is_noise(model, reparam):
    add_adapter(model, PromptConfig(20, init="vocab", reparam=reparam))
    equal = (model.prompt.vectors()[:, None] == model.embedding.weight).all(dim=-1)  # [P, V]
    assert equal.any(dim=1).all()
    assert equal.any(dim=0).sum() > 10  # different ones
    remove_adapter(model)
    add_adapter(model, PromptConfig(60, init="normal", reparam=reparam))
    assert model.prompt.vectors().std().item() == pytest.approx(1, abs=0.05)


def test_the_seed_decides(decoder):
    drawn = []
    for seed in (0, 0, 1):
        model = decoder("llama")
        add_adapter(model, PromptConfig(9, init="vocab"), seed=seed)
        drawn.append(model.prompt.weight.detach())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


# HF PEFT, where it is right


def test_logits_and_gradients_are_pefts(both, ids, apart, gradients):
    ours, theirs = both
    with torch.no_grad():
        assert apart(ours(ids), theirs(ids).logits[:, 5:]) < 1e-5
    labels = ids.clone()
    labels[:, 0] = -100  # PEFT would take a loss on the first token too, from the last column
    loss, found = gradients(ours, [Batch(ids, labels, torch.zeros_like(ids))])
    table = theirs.prompt_encoder["default"].embedding.weight.requires_grad_(True)
    wanted = theirs(ids, labels=labels).loss
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    assert apart(found["prompt.weight"], table.grad) < 1e-5


def test_pefts_own_file_means_what_it_means_there(model, peer, ids, apart, tmp_path):
    theirs = peft.get_peft_model(peer, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(model, tmp_path / "theirs")
    with torch.no_grad():
        assert apart(model(ids), theirs.eval()(ids).logits[:, 5:]) < 1e-5


# HF PEFT 0.21, where it is not right. When one of these fails, PEFT has mended it: take it off the list.


def quiet(theirs: nn.Module, ids: Tensor, **given: Tensor) -> Tensor:
    """PEFT's logits of the real tokens; it warns that it drops the positions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return theirs(ids, **given).logits[:, 5:]


def test_peft_lets_packed_documents_see_each_other(both, ids):
    ours, theirs = both
    documents = torch.tensor([[0] * 12 + [1] * 18] * 2)
    positions = torch.cat([torch.arange(12), torch.arange(18)]).expand(2, -1)
    with torch.no_grad():
        alone = theirs(ids[:, 12:]).logits[:, 5:]
        assert (quiet(theirs, ids, position_ids=positions)[:, 12:] - alone).abs().max() > 1
        assert (ours(ids, documents)[:, 12:] - alone).abs().max() < 1e-4


def test_peft_gets_left_padding_wrong(both, ids):
    """It puts the prompt before the padding: prompt, pad, pad, text, with consecutive positions."""
    ours, theirs = both
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with torch.no_grad():
        alone = theirs(ids[:1, 9:]).logits[0, 5:]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        padded = quiet(theirs, ids, attention_mask=mask, position_ids=positions)[0, 9:]
        assert (padded - alone).abs().max() > 1
        assert (ours(ids, mask - 1)[0, 9:] - alone).abs().max() < 1e-4


# Errors


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"length": 0}, "length: 0 must be an integer >= 1"),
        ({"windowed": 1}, "windowed: 1 must be true or false"),
        ({"reparam": 1.5}, "reparam: 1.5 must be an integer >= 1"),
        ({"init": "peft"}, r"init: 'peft' is not known \(text, vocab, normal\)"),
    ],
)
def test_settings_that_cannot_be_honoured(change, said):
    with pytest.raises(InputError, match=said):
        PromptConfig(**change)


def test_starting_from_text_needs_text_and_a_tokenizer(decoder):
    model = decoder("gpt2")
    with pytest.raises(InputError, match="prompt init: initialization from text needs the tokenizer"):
        add_adapter(model, PromptConfig(5))
    with pytest.raises(InputError, match="'' has no tokens"):
        add_adapter(model, PromptConfig(5, text=""), Letters())
    assert model.adapter is None
    assert model.prompt is None
