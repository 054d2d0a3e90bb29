"""An adapter bank: each row as with its adapter alone; memory; removal restores the model."""

import copy
import gc
import os
import string
import weakref
from pathlib import Path

import pytest
import torch

import minipeft
from minipeft.adapters import LoRAConfig, PrefixConfig, add_adapter, remove_adapter
from minipeft.adapters.bank import AdapterBank, BankLinear
from minipeft.adapters.peft_format import load_adapter, save_adapter
from minipeft.errors import InputError
from minipeft.generation import GenerateConfig, generate

ADAPTERS = {  # of different ranks, targets, scales
    "a": LoRAConfig(2, 8.0),
    "b": LoRAConfig(5, 3.0, targets="default"),
    "c": LoRAConfig(3, 6.0, rslora=True, layers=(1,)),
    "d": LoRAConfig(4, 4.0, init="pissa", rank_pattern={"c_proj|o_proj": 1}),
}
ROUNDING = 5e-5  # of the largest logit, float32: adapters as large as the weights, products in another order
MIXTURES = {
    "all different": ["a", "b", "c", "d"],
    "with the base": ["d", None, "a", "a", None, "b"],
    "one for all": ["b", "b", "b"],
    "pairs in order": ["a", "a", "c", "c"],
    "one row": ["c"],
    "base only": [None, None],
    "unlike groups": ["a", "b", "a", "a", "c", None, "b", "a"],
}


class Letters:
    """A tokenizer of one id a letter."""

    eos, bos = 60, None

    def encode_all(self, texts):
        return [[string.ascii_letters.index(letter) for letter in text] for text in texts]

    def decode(self, ids):
        return "".join((string.ascii_letters + "0123456789")[i] for i in ids)


@pytest.fixture
def folders(decoder, family, stir, tmp_path):
    """Each of ADAPTERS, trained by noise, on disk."""
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        model = decoder(family)
        add_adapter(model, config)
        save_adapter(stir(model, scale=0.15, seed=seed), tmp_path / name)
    return tmp_path


@pytest.fixture
def bank(model, folders):
    made = AdapterBank(model)
    for name in ADAPTERS:
        made.load(name, folders / name)
    return made


def alone(model, folders, name, compute):
    """The result of `compute` with this adapter only."""
    model = copy.deepcopy(model)
    if isinstance(model.adapter, AdapterBank):
        model.adapter.close()
    if name is not None:
        load_adapter(model, folders / name)
    with torch.no_grad():
        return compute(model)


@pytest.mark.parametrize("names", MIXTURES.values(), ids=list(MIXTURES))
def test_each_row_gets_its_own_adapter(model, bank, folders, names, apart):
    ids = torch.randint(0, 61, (len(names), 20), generator=torch.Generator().manual_seed(3))
    owners = torch.zeros_like(ids)
    owners[0, :5] = -1
    with torch.no_grad(), bank.use(names):
        mixed = model(ids, owners)
        cache = model.new_cache(len(names), 20)
        pieces = [model(ids[:, :12], owners[:, :12], cache)]
        pieces += [model(ids[:, i : i + 1], cache=cache) for i in range(12, 20)]
    for row, name in enumerate(names):
        wanted = alone(model, folders, name, lambda m, row=row: m(ids[row : row + 1], owners[row : row + 1]))[0]
        first = 5 if row == 0 else 0
        assert apart(mixed[row, first:], wanted[first:]) <= ROUNDING
        assert apart(torch.cat(pieces, dim=1)[row, first:], wanted[first:]) <= ROUNDING
    if other := [row for row, name in enumerate(names) if name != names[0]]:
        assert apart(alone(model, folders, names[0], lambda m: m(ids))[other[0]], mixed[other[0]]) > 0.01


def test_generate_gives_each_prompt_what_its_adapter_gives_it_alone(model, bank, folders):
    prompts = ["abc", "Hello", "q", "zzzzzzzz", "minipeft", "x", "Adapters"]
    names = ["a", None, "b", "c", "a", "d", "b"]
    config = GenerateConfig(max_new_tokens=20, temperature=0.7, batch=4, stop=("e",))
    mixed = generate(model, Letters(), prompts, config, adapters=names)
    for name in {*names}:
        wanted = alone(model, folders, name, lambda m: generate(m, Letters(), prompts, config))
        assert [mixed[i] for i, mine in enumerate(names) if mine == name] == [
            wanted[i] for i, mine in enumerate(names) if mine == name
        ]
    assert len(set(mixed)) == len(mixed)
    assert not any(layer.stack or layer.rows for layer in bank.layers.values())


def test_rows_that_end_are_dropped(model, bank, apart):
    ids = torch.randint(0, 61, (5, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), bank.use(["a", "b", None, "c", "b"]):
        whole = model(ids)
        for places in ([0, 1, 2, 4], [1, 2, 3], [1]):
            bank.keep(places)
            ids, whole = ids[places], whole[places]
            assert apart(model(ids), whole) <= ROUNDING


def test_the_base_is_not_touched(decoder, family, folders, ids):
    model = decoder(family)
    model.blocks[0].requires_grad_(False)
    before, shown = copy.deepcopy(model.state_dict()), repr(model)
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    held = dict(model.named_parameters())
    bank = AdapterBank(model)
    assert list(model.state_dict()) == list(before)
    assert not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        plain = model(ids)
        for name in ADAPTERS:
            bank.load(name, folders / name)
        assert torch.equal(model(ids), plain)
        with bank.use([None, None]):
            assert torch.equal(model(ids), plain)
        with bank.use(["a", "b"]):
            assert not torch.equal(model(ids), plain)
        bank.drop("a")
    bank.close()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert repr(model) == shown
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    assert all(p is held[name] for name, p in model.named_parameters())
    add_adapter(model, LoRAConfig(2))


def test_an_adapter_takes_its_own_size_and_gives_it_back(bank):
    a, b = next(iter(bank.adapters["a"].values()))
    assert bank.size("a") == sum(4 * (x.numel() + y.numel()) for x, y in bank.adapters["a"].values())
    assert a.untyped_storage().nbytes() + b.untyped_storage().nbytes() == 4 * (a.numel() + b.numel())
    gone = weakref.ref(a)
    with bank.use(["a", "b"]):
        pass
    bank.drop("a")
    del a, b
    gc.collect()
    assert gone() is None
    assert list(bank.adapters) == ["b", "c", "d"]


def test_half_precision(decoder, folders, family, apart):
    model = decoder(family).to(torch.bfloat16)
    ids = torch.randint(0, 61, (3, 9), generator=torch.Generator().manual_seed(3))
    bank = AdapterBank(model)
    for name in "ab":
        bank.load(name, folders / name)
    with torch.no_grad(), bank.use(["a", "b", None]):
        mixed = model(ids)
    assert mixed.dtype == torch.bfloat16
    assert all(t.dtype == torch.bfloat16 for pair in bank.adapters["a"].values() for t in pair)
    for row, name in enumerate(["a", "b", None]):
        wanted = alone(model, folders, name, lambda m, row=row: m(ids[row : row + 1]))
        assert apart(mixed[row].float(), wanted[0].float()) <= 0.15


def test_what_a_bank_refuses(model, bank, folders, stir):
    with pytest.raises(InputError, match=r"bank: the bank holds 'a' already. bank\.drop\('a'\) first"):
        bank.load("a", folders / "a")
    with pytest.raises(InputError, match=r"adapters: the bank does not hold 'z' \(it holds: a, b, c, d\)"):
        bank.drop("z")
    with pytest.raises(InputError, match="does not hold 'z'"), bank.use(["a", "z"]):
        pass
    with bank.use(["a"]), pytest.raises(InputError, match="bank: is in use already"), bank.use(["b"]):
        pass
    with bank.use(["a", "b", "c"]), pytest.raises(InputError, match="3 adapters were named for a batch of 2 rows"):
        model(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(InputError, match="the model holds a bank of adapters already"):
        add_adapter(model, LoRAConfig(2))
    with pytest.raises(InputError, match="the model holds a bank of adapters already"):
        load_adapter(model, folders / "a")
    with pytest.raises(InputError, match=r"holds a bank of adapters. bank\.close\(\) removes it"):
        remove_adapter(model)
    with pytest.raises(InputError, match="holds a bank of adapters; only LoRA"):
        minipeft.merge_adapter(model)
    with pytest.raises(InputError, match="the model holds a bank of adapters"):
        save_adapter(model, folders / "out")


def test_what_generate_refuses(model, bank):
    ask = lambda **given: generate(model, Letters(), ["ab", "cd"], GenerateConfig(2), **given)
    with pytest.raises(InputError, match="adapters: must be a list of 2 names, one for each prompt"):
        ask(adapters=["a"])
    with pytest.raises(InputError, match="the bank does not hold 'z'"):
        ask(adapters=["a", "z"])
    bank.close()
    with pytest.raises(InputError, match=r"the model holds no bank of adapters. bank = AdapterBank\(model\)"):
        ask(adapters=["a", "b"])


def test_other_adapters_are_refused(decoder, family, tmp_path):
    for config, said in [
        (LoRAConfig(2, dora=True), "holds LoRA with dora or lora_bias; a bank takes plain LoRA"),
        (LoRAConfig(2, lora_bias=True), "holds LoRA with dora or lora_bias"),
        (PrefixConfig(2, init="peft"), "holds prefix-tuning; a bank takes plain LoRA"),
    ]:
        model = decoder(family)
        add_adapter(model, config)
        save_adapter(model, tmp_path / "other")
        with pytest.raises(InputError, match=r"the model holds (lora|prefix) already"):
            AdapterBank(model)
        plain = AdapterBank(decoder(family))
        with pytest.raises(InputError, match=said):
            plain.load("other", tmp_path / "other")
        assert not plain.adapters


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_two_hundred_adapters_fit_in_their_own_size(decoder, tmp_path):
    model = decoder("llama", hidden_size=128, intermediate_size=384, num_hidden_layers=2)
    add_adapter(model, LoRAConfig(16))
    save_adapter(model, tmp_path / "one")
    remove_adapter(model)
    bank = AdapterBank(model)
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    bank.load("warm", tmp_path / "one")
    before = resident()
    for i in range(200):
        bank.load(str(i), tmp_path / "one")
    whole = sum(bank.size(str(i)) for i in range(200))
    assert whole == 200 * bank.size("warm") > 50e6
    assert resident() - before < 1.2 * whole  # less where the process had memory to spare from earlier tests
    assert sum(isinstance(m, BankLinear) for m in model.modules()) == 14
