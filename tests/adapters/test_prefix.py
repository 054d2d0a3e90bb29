"""Prefix-tuning: init and gate; and HF PEFT's prefix, in the cases where it is right and wrong."""

import dataclasses
import json
import warnings
from collections.abc import Callable

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from minipeft.adapters import PrefixConfig, PromptConfig, add_adapter, remove_adapter
from minipeft.adapters.peft_format import load_adapter, save_adapter
from minipeft.adapters.peft_virtual import collect_table
from minipeft.adapters.prefix import list_attentions, list_prefixes
from minipeft.adapters.virtual import TASK_LINE, encode_to_length, run_text
from minipeft.data.packing import Batch
from minipeft.data.tokens import load_tokenizer
from minipeft.errors import InputError
from minipeft.models.checkpoint import load_model, save_model
from minipeft.training.loop import TrainConfig, train

TEXT = "abracadabra"
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


class Letters:
    """A tokenizer for the tiny models: a letter is a token."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 61 for letter in text]


def hard_prompt(length: int) -> Tensor:
    return torch.tensor([encode_to_length(TEXT, length, Letters(), "test")])


@pytest.fixture
def peer(tmp_path) -> Callable[[nn.Module], nn.Module]:
    """transformers' model of the same weights, made before an adapter is added."""

    def make(model: nn.Module) -> nn.Module:
        save_model(model, tmp_path / "base")
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()

    return make


# How it starts


@pytest.mark.parametrize("length", [5, 14])
@pytest.mark.parametrize("windowed", [False, True])
def test_text_start_is_the_text_written_before_the_input(model, peer, ids, apart, length, windowed):
    """Prefix == prompt == hard prompt, ours and transformers'; under a window only where it hides the columns too."""
    if model.config.model_type == "mistral" and not windowed:
        length, ids = length // 3, ids[:, :2]  # at most 4 + 2 tokens in a window of 6
    theirs, given = peer(model), torch.cat([hard_prompt(length).expand(2, -1), ids], dim=1)
    with torch.no_grad():
        wanted = theirs(given).logits[:, length:]
        by_hand = model(given)[:, length:]
        for config in (PrefixConfig, PromptConfig):
            add_adapter(model, config(length, text=TEXT, windowed=windowed), Letters())
            assert apart(model(ids), by_hand) < 1e-5
            assert apart(model(ids), wanted) < 1e-5
            remove_adapter(model)
        assert apart(model(ids), wanted) > 0.1  # the text matters


def test_text_start_on_a_real_model_says_what_the_text_says(assets, apart):
    folder = assets / "fixtures" / "stories260K"
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    ids = torch.tensor([tokenizer.encode("Once upon a time, there was a little girl named Lily.")])
    text = torch.tensor([encode_to_length(TASK_LINE, 20, tokenizer, "test")])
    assert text[0, 0] == tokenizer.bos  # attention rests there
    assert (text[0, 1:] != tokenizer.bos).all()  # and the text is repeated without it
    with torch.no_grad():
        wanted = model(torch.cat([text, ids], dim=1))[:, 20:]
        add_adapter(model, PrefixConfig(), tokenizer)
        assert apart(model(ids), wanted) < 1e-5


def test_noise_buries_the_text_and_zeros_are_not_nothing(assets):
    """N(0, 1) costs a trained model 6 nats before any training, zeros cost too; a gated prefix costs nothing."""
    folder = assets / "fixtures" / "stories260K"
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    ids = torch.tensor([tokenizer.encode("Once upon a time, there was a little girl named Lily. She loved to play.")])

    def loss() -> float:
        with torch.no_grad():
            return nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).item()

    base = loss()
    add_adapter(model, PrefixConfig(init="peft"))
    assert loss() > base + 4
    with torch.no_grad():
        for prefix in list_prefixes(model):
            prefix.key.zero_()
            prefix.value.zero_()
    assert loss() > base + 0.02
    remove_adapter(model)
    add_adapter(model, PrefixConfig(), tokenizer)
    assert loss() < base + 0.1
    remove_adapter(model)
    add_adapter(model, PrefixConfig(init="peft", gate=True))
    assert loss() == base


def test_normal_start_is_spread_as_the_texts_own_keys(decoder):
    model = decoder("llama", max_position_embeddings=8000)
    keys, values = run_text(model, Letters().encode(TEXT))  # each [L, K, n, D]
    add_adapter(model, PrefixConfig(4000, init="normal", text=TEXT), Letters())
    drawn = torch.stack([p.key for p in list_prefixes(model)])  # [L, K, P, D]
    assert (drawn.mean(dim=2) - keys.mean(dim=2)).abs().max() < 0.1 * keys.std()
    assert ((drawn.std(dim=2) / keys.std(dim=2)) - 1).abs().max() < 0.1
    assert all(p.value.abs().max() == 0 for p in list_prefixes(model))
    remove_adapter(model)
    add_adapter(model, PrefixConfig(4000, init="normal", text=TEXT, gate=True), Letters())
    drawn = torch.stack([p.value for p in list_prefixes(model)])
    assert ((drawn.std(dim=2) / values.std(dim=2)) - 1).abs().max() < 0.1  # 0 behind a gate of 0 could not be left


def test_pefts_start_is_standard_normal_and_the_seed_decides(decoder):
    tables = []
    for seed in (0, 0, 1):
        model = decoder("llama", max_position_embeddings=1000)
        add_adapter(model, PrefixConfig(900, init="peft"), seed=seed)
        tables.append(collect_table(model))
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
    assert tables[0].mean().abs() < 0.01
    assert tables[0].std() == pytest.approx(1, abs=0.01)


def test_the_first_column_stays_where_attention_rests(model, packed):
    add_adapter(model, PrefixConfig(4, text=TEXT, freeze_first=True), Letters())
    before = collect_table(model)
    for _ in train(model, [packed] * 4, TrainConfig(steps=4, learning_rate=1e-2, weight_decay=0.1)):
        pass
    moved = (collect_table(model) - before).abs().amax(dim=1)  # [P]
    assert moved[0] == 0
    assert (moved[1:] > 0).all()


# The gate


@pytest.mark.parametrize("reparam", [None, 6])
def test_the_gate_starts_as_nothing_at_all(model, ids, reparam):
    with torch.no_grad():
        wanted = model(ids)
        add_adapter(model, PrefixConfig(5, text=TEXT, gate=True, reparam=reparam), Letters())
        assert torch.equal(model(ids), wanted)
        assert model.virtual_tokens == 0
        cache = model.new_cache(2, 30)
        parts = [model(ids[:, :20], cache=cache), *(model(ids[:, t : t + 1], cache=cache) for t in range(20, 30))]
        remove_adapter(model)
        cache = model.new_cache(2, 30)
        plain = [model(ids[:, :20], cache=cache), *(model(ids[:, t : t + 1], cache=cache) for t in range(20, 30))]
        assert torch.equal(torch.cat(parts, 1), torch.cat(plain, 1))


def test_the_gate_adds_a_softmax_of_its_own(model, apart):
    """Against literal loops in float64."""
    add_adapter(model, PrefixConfig(5, init="peft", gate=True))
    c, beside = model.config, list_attentions(model)[0].beside
    with torch.no_grad():
        beside.gate.copy_(torch.linspace(-1, 1, c.heads))
        q = torch.randn(2, c.heads, 3, c.head_width, generator=torch.Generator().manual_seed(3))
        found = beside(q, None)  # [B, T, H * D]
        keys, values = (t.double() for t in beside.prefix.key_value())  # [K, P, D]
        gate = torch.tanh(beside.gate.double())
    for b in range(2):
        for h in range(c.heads):
            k, v = keys[h * c.kv_heads // c.heads], values[h * c.kv_heads // c.heads]
            for t in range(3):
                weights = torch.softmax(k @ q[b, h, t].double() / c.head_width**0.5, dim=0)  # [P]
                wanted = gate[h] * (weights @ v)
                assert apart(found[b, t, h * c.head_width : (h + 1) * c.head_width], wanted) < 1e-5


# HF PEFT, where it is right


@pytest.fixture
def both(model, peer, stir, tmp_path) -> tuple[nn.Module, nn.Module]:
    """(ours, PEFT's) with one prefix, through the files; as under PEFT a window hides the columns."""
    theirs = peer(model)
    add_adapter(model, PrefixConfig(5, text=TEXT, windowed=True), Letters())
    save_adapter(stir(model), tmp_path / "adapter")
    return model, peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()


def test_logits_and_gradients_are_pefts(both, ids, apart, gradients):
    ours, theirs = both
    with torch.no_grad():
        assert apart(ours(ids), theirs(ids).logits) < 1e-5
    labels = ids.clone()
    labels[:, 0] = -100
    loss, found = gradients(ours, [Batch(ids, labels, torch.zeros_like(ids))])
    table = theirs.prompt_encoder["default"].embedding.weight.requires_grad_(True)
    wanted = theirs(ids, labels=labels).loss
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    c = ours.config
    keys, values = table.grad.view(5, c.layers, 2, c.kv_heads, c.head_width).permute(2, 1, 3, 0, 4)  # [L, K, P, D]
    for layer, (key, value) in enumerate(zip(keys, values)):
        site = next(name for name in found if f".{layer}." in name).rsplit(".", 1)[0]
        assert apart(found[f"{site}.key"], key) < 1e-5
        assert apart(found[f"{site}.value"], value) < 1e-5


def test_pefts_own_file_means_what_it_means_there(model, peer, ids, apart, tmp_path):
    """Also on Mistral: without our file beside it, the window hides the virtual tokens, as in PEFT."""
    theirs = peft.get_peft_model(peer(model), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(model, tmp_path / "theirs")
    with torch.no_grad():
        assert apart(model(ids), theirs.eval()(ids).logits) < 1e-5


# HF PEFT 0.21, where it is not right. When one of these fails, PEFT has mended it: take it off the list.


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"], indirect=True)
def test_peft_lets_packed_documents_see_each_other(both, ids):
    ours, theirs = both
    documents = torch.tensor([[0] * 12 + [1] * 18] * 2)
    positions = torch.cat([torch.arange(12), torch.arange(18)]).expand(2, -1)
    with torch.no_grad():
        alone = theirs(ids[:, 12:]).logits
        assert (theirs(ids, position_ids=positions).logits[:, 12:] - alone).abs().max() > 1
        assert (ours(ids, documents)[:, 12:] - alone).abs().max() < 1e-4


def test_peft_cannot_train_under_activation_checkpointing(both, ids):
    _, theirs = both
    theirs.prompt_encoder["default"].embedding.weight.requires_grad_(True)
    theirs.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with pytest.raises(RuntimeError, match="must match the size"):
            theirs(ids, labels=ids)


def test_peft_cannot_go_on_training(both, tmp_path):
    _, theirs = both
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        peft.PeftModel.from_pretrained(theirs.base_model, tmp_path / "adapter", is_trainable=True)


def test_pefts_prefix_leaves_mistrals_window(decoder, gradients, ids):
    """The last token's loss reaches the last layer's virtual tokens, unless the window hides them, as in PEFT."""
    reached = {}
    for windowed in (False, True):
        model = decoder("mistral")
        add_adapter(model, PrefixConfig(5, text=TEXT, windowed=windowed), Letters())
        labels = torch.full_like(ids, -100)
        labels[:, -1] = ids[:, -1]
        _, found = gradients(model, [Batch(ids, labels, torch.zeros_like(ids))])
        reached[windowed] = max(g.abs().max().item() for name, g in found.items() if "layers.2." in name)
    assert reached[True] == 0
    assert reached[False] > 1e-3


@pytest.mark.parametrize("family", ["mistral"], indirect=True)
def test_peft_gets_left_padding_wrong_under_a_window(both, ids):
    ours, theirs = both
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = theirs(ids[:1, 9:]).logits[0]
        padded = theirs(ids, attention_mask=mask, position_ids=positions).logits[0, 9:]
        assert (padded - alone).abs().max() > 1
        assert (ours(ids, mask - 1)[0, 9:] - alone).abs().max() < 1e-4


def test_pefts_zero_start_keeps_all_columns_alike(decoder, peer, packed):
    """All get the same gradient in every step: one virtual token, P times. Ours with value 0 have different keys."""
    model = decoder("llama")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, init_weights="zero")
    theirs = peft.get_peft_model(peer(model), config)
    table = theirs.prompt_encoder["default"].embedding.weight
    optimizer = torch.optim.Adam([table], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        theirs(packed.ids[:, :30], labels=packed.ids[:, :30]).loss.backward()
        optimizer.step()
    assert table.abs().max() > 0.01
    assert (table - table[:1]).abs().max() < 1e-6
    add_adapter(model, PrefixConfig(5, init="normal", text=TEXT), Letters())
    for _ in train(model, [packed] * 3, TrainConfig(steps=3, learning_rate=1e-2)):
        pass
    values = torch.stack([p.value.detach() for p in list_prefixes(model)])
    assert (values - values[:, :, :1]).abs().max() > 1e-3


def test_peft_leaves_a_prefix_out_in_silence_where_the_task_is_not_named(decoder, peer, ids, apart, tmp_path):
    model = decoder("llama")
    base = peer(model)
    with torch.no_grad():
        untouched = base(ids).logits
        add_adapter(model, PrefixConfig(5, text=TEXT), Letters())
        save_adapter(model, tmp_path / "adapter")
        file = tmp_path / "adapter" / "adapter_config.json"
        named = json.loads(file.read_text())
        assert named["task_type"] == "CAUSAL_LM"  # so we name it
        file.write_text(json.dumps(named | {"task_type": None}))
        assert apart(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(ids).logits, untouched) < 1e-6
        remove_adapter(model)
        load_adapter(model, tmp_path / "adapter")  # and do not need it
        assert apart(model(ids), untouched) > 0.1


def test_peft_refuses_a_gated_prefix(decoder, peer, tmp_path):
    model = decoder("llama")
    theirs = peer(model)
    add_adapter(model, PrefixConfig(5, text=TEXT, gate=True), Letters())
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(KeyError, match="GATED_PREFIX_TUNING"):
        peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")


# Errors


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"length": 0}, "length: 0 must be an integer >= 1"),
        ({"length": True}, "length: True must be an integer >= 1"),
        ({"gate": "no"}, "gate: 'no' must be true or false"),
        ({"reparam": 0}, "reparam: 0 must be an integer >= 1"),
        ({"init": "zero"}, r"init: 'zero' is not known \(text, normal, peft\)"),
        ({"length": 1, "freeze_first": True}, "freeze_first: leaves nothing to train of a single virtual token"),
        ({"gate": True, "windowed": True}, "windowed: a gated prefix has its own softmax and no window"),
    ],
)
def test_settings_that_cannot_be_honoured(change, said):
    with pytest.raises(InputError, match=said):
        dataclasses.replace(PrefixConfig(), **change)


@pytest.mark.parametrize("init", ["text", "normal"])
def test_starting_from_text_needs_text_and_a_tokenizer(decoder, init):
    model = decoder("llama")
    with pytest.raises(InputError, match="prefix init: initialization from text needs the tokenizer"):
        add_adapter(model, PrefixConfig(5, init=init))
    said = "'' has no tokens" if init == "text" else "'' has no two tokens to measure a spread from"
    with pytest.raises(InputError, match=said):
        add_adapter(model, PrefixConfig(5, init=init, text=""), Letters())
    assert model.adapter is None
    assert model.virtual_tokens == 0
    add_adapter(model, PrefixConfig(5, text=TEXT), Letters())  # nothing was left half done
