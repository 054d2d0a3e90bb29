"""Taking an adapter out and putting it back, and sets of adapters: against the same adapter alone, and against PEFT."""

import copy
import gc
import re
import warnings
import weakref

import peft
import pytest
import torch
import transformers

import minipeft
from minipeft.adapters import (
    FullConfig,
    IA3Config,
    LNTuningConfig,
    LoRAConfig,
    PrefixConfig,
    PromptConfig,
    VeRAConfig,
    add_adapter,
)
from minipeft.adapters.lora import find_lora_layers
from minipeft.adapters.peft_format import load_adapter, save_adapter
from minipeft.adapters.switching import AdapterSet, disabled
from minipeft.errors import InputError
from minipeft.models.checkpoint import save_model
from minipeft.training.loop import TrainConfig, train

transformers.logging.set_verbosity_error()
warnings.filterwarnings("ignore", module="peft")
pytestmark = pytest.mark.filterwarnings("ignore")

METHODS = {
    "lora": LoRAConfig(4, 8.0, dropout=0.1),
    "dora": LoRAConfig(4, 8.0, dora=True),
    "pissa": LoRAConfig(4, 8.0, init="pissa"),
    "lora_bias": LoRAConfig(4, 8.0, lora_bias=True),
    "ia3": IA3Config(),
    "vera": VeRAConfig(8, targets="all-linear"),
    "ln_tuning": LNTuningConfig(),
    "prefix": PrefixConfig(3, init="peft"),
    "prefix with MLP": PrefixConfig(3, init="peft", reparam=8, windowed=True),
    "gated prefix": PrefixConfig(3, init="peft", gate=True),
    "prompt": PromptConfig(3, init="vocab"),
}


@pytest.mark.parametrize("config", METHODS.values(), ids=list(METHODS))
def test_disabled_is_the_base_to_the_bit_and_afterwards_all_is_as_before(model, ids, stir, config):
    shown = repr(model)
    with torch.no_grad():
        base = model(ids)
        add_adapter(model, config)
        tuned, held, adapted = stir(model)(ids), list(model.parameters()), repr(model)
        assert not torch.equal(tuned, base)
        with disabled(model):
            assert torch.equal(model(ids), base)
            assert (model.adapter, model.virtual_tokens, model.windowed, model.prompt) == (None, 0, False, None)
            assert not any(p.requires_grad for p in model.parameters())
            said = f"{minipeft.adapters.find_method(config).name} disabled"
            assert repr(model).replace(f"\n  {said}", "", 1) == shown
        with pytest.raises(ZeroDivisionError), disabled(model):
            raise ZeroDivisionError
        assert torch.equal(model(ids), tuned)
    assert repr(model) == adapted
    assert all(a is b for a, b in zip(model.parameters(), held, strict=True))


@pytest.mark.parametrize("name", ["lora", "dora", "prefix with MLP", "prompt"])
def test_reference_passes_between_steps_change_no_bit_of_a_training(decoder, packed, name):
    def run(passes):
        model, references = decoder("llama"), []
        base = model(packed.ids, packed.documents)
        add_adapter(model, METHODS[name])
        for _ in train(model, [packed] * 4, TrainConfig(4, learning_rate=1e-2, activation_checkpointing=True)):
            for _ in range(passes):
                with torch.no_grad(), disabled(model):
                    references.append(torch.equal(model.eval()(packed.ids, packed.documents), base))
                model.train()
        assert references == [True] * 4 * passes
        return model.state_dict()

    plain, interrupted = run(0), run(2)
    assert plain.keys() == interrupted.keys()
    assert all(torch.equal(tensor, interrupted[key]) for key, tensor in plain.items())


def test_a_model_that_is_cast_or_loaded_while_disabled_is_adapted_on_its_new_weights(decoder, ids, stir):
    model = decoder("llama")
    add_adapter(model, LoRAConfig(4))
    stir(model)
    twin = copy.deepcopy(model)
    with disabled(model):
        model.to(torch.bfloat16)
        fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(fresh, assign=True)
    assert torch.equal(model(ids), twin.to(torch.bfloat16)(ids))
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_a_quantized_base_is_switched_too(decoder, ids, stir):
    model = decoder("llama")
    minipeft.models.quantized.quantize_model(model, "nf4")
    with torch.no_grad():
        base = model(ids)
        add_adapter(model, LoRAConfig(4))
        tuned = stir(model)(ids)
        with disabled(model):
            assert torch.equal(model(ids), base)
        assert torch.equal(model(ids), tuned)


CONFIGS = {"a": LoRAConfig(4, 8.0), "b": LoRAConfig(4, 2.0, targets="default"),
           "c": LoRAConfig(2, 6.0, rslora=True, layers=(1,)), "p": PrefixConfig(3, init="peft", windowed=True),
           "q": PromptConfig(5, init="normal", windowed=True)}  # fmt: skip


@pytest.fixture
def folders(decoder, family, stir, tmp_path):
    """Each of CONFIGS, trained by noise, on disk; and the base."""
    for seed, (name, config) in enumerate(CONFIGS.items()):
        model = decoder(family)
        add_adapter(model, config)
        save_adapter(stir(model, scale=0.15, seed=seed), tmp_path / name)
    save_model(decoder(family), tmp_path / "base")
    return tmp_path


def test_each_of_a_set_computes_what_it_computes_alone_and_what_peft_computes(model, folders, ids, apart):
    peer = transformers.AutoModelForCausalLM.from_pretrained(folders / "base", attn_implementation="eager").eval()
    theirs = peft.PeftModel.from_pretrained(peer, folders / "a", adapter_name="a")
    for name in "bc":
        theirs.load_adapter(folders / name, adapter_name=name)
    shown, alone = repr(model), {None: model(ids)}
    for name in CONFIGS:
        load_adapter(model, folders / name)
        alone[name] = model(ids)
        minipeft.remove_adapter(model)
    adapters = AdapterSet(model)
    for name in CONFIGS:
        adapters.load(name, folders / name)
        assert torch.equal(model(ids), alone[name])
    assert adapters.names == list(CONFIGS)
    with torch.no_grad():
        for name in ("c", "p", None, "a", "q", "a", "b", None, "c", "c"):
            adapters.switch(name)
            assert torch.equal(model(ids), alone[name])
            assert (model.adapter is None) == (name is None)
            if name in ("a", "b", "c"):
                theirs.set_adapter(name)
                assert apart(model(ids), theirs(ids).logits) <= 1e-5
    assert "adapters: a, b, c (active), p, q" in repr(model)
    with torch.no_grad(), disabled(model):
        assert torch.equal(model(ids), alone[None])
        assert "adapters: a, b, c (active), p, q, lora disabled" in repr(model)
    adapters.close()
    assert repr(model) == shown
    assert torch.equal(model(ids), alone[None])
    assert all(p.requires_grad for p in model.parameters())


def test_one_of_a_set_is_trained_and_saved_and_the_others_stay(model, folders, packed, ids):
    adapters = AdapterSet(model)
    adapters.load("a", folders / "a")
    before = model(ids)
    adapters.add("new", LoRAConfig(3))
    for _ in train(model, [packed] * 2, TrainConfig(2, learning_rate=1e-2)):
        adapters.switch("a")  # another one between two steps
        assert torch.equal(model.eval()(ids), before)
        adapters.switch("new")
    trained = model.eval()(ids)
    save_adapter(model, folders / "new")
    adapters.switch("a")
    assert torch.equal(model(ids), before)
    adapters.close(keep="a")
    assert torch.equal(model(ids), before)
    minipeft.remove_adapter(model)
    load_adapter(model, folders / "new")
    assert torch.equal(model(ids), trained)


def test_deleting_one_frees_it(model, folders, ids):
    with torch.no_grad():
        base, adapters = model(ids), AdapterSet(model)
        adapters.load("a", folders / "a")
        adapters.load("b", folders / "b")
        kept = model(ids)
        adapters.switch("a")
        gone = weakref.ref(next(iter(find_lora_layers(model).values())).lora_A)
        adapters.delete("a")
        gc.collect()
        assert gone() is None
        assert torch.equal(model(ids), base)
        assert adapters.names == ["b"]
        adapters.switch("b")
        assert torch.equal(model(ids), kept)


WEIGHTED = {"cat": (["a", "b", "c"], {}), "svd": (["a", "b", "c"], {"rank": 5}), "linear": (["a", "b"], {})}


@pytest.mark.parametrize("how", WEIGHTED)
def test_a_weighted_sum_is_pefts(model, folders, ids, apart, how):
    names, given = WEIGHTED[how]
    weights = dict(zip(names, (0.7, -0.4, 1.3)))
    peer = transformers.AutoModelForCausalLM.from_pretrained(folders / "base", attn_implementation="eager").eval()
    theirs = peft.PeftModel.from_pretrained(peer, folders / "a", adapter_name="a")
    for name in names[1:]:
        theirs.load_adapter(folders / name, adapter_name=name)
    theirs.add_weighted_adapter(names, list(weights.values()), "sum", how, svd_rank=given.get("rank"))
    theirs.set_adapter("sum")
    adapters = AdapterSet(model)
    for name in names:
        adapters.load(name, folders / name)
    updates, modules = {}, dict(theirs.named_modules())
    for name in names:
        adapters.switch(name)
        for path, layer in find_lora_layers(model).items():
            update = weights[name] * layer.scale * (layer.lora_B @ layer.lora_A).double()
            updates[path] = updates.get(path, 0) + update.detach()
    error = adapters.combine("sum", weights, how, **given)
    missed, whole = 0.0, 0.0
    with torch.no_grad():
        assert find_lora_layers(model).keys() == updates.keys()
        for path, layer in find_lora_layers(model).items():
            made = layer.scale * (layer.lora_B @ layer.lora_A)
            twin = modules[f"base_model.model.{path}"].get_delta_weight("sum")
            wanted = twin.t() if model.family.transposed else twin
            torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
            missed += float((made.double() - updates[path]).square().sum())
            whole += float(updates[path].square().sum())
        assert apart(model(ids), theirs(ids).logits) <= 5e-5
    assert error == pytest.approx((missed / whole) ** 0.5, rel=1e-3, abs=1e-6)
    assert (error < 1e-6) == (how == "cat")
    with torch.no_grad():
        made = model(ids)
        save_adapter(model, folders / "sum")
        adapters.close()
        load_adapter(model, folders / "sum")
        assert torch.equal(model(ids), made)
        merged = copy.deepcopy(model)
        minipeft.merge_adapter(merged)
        assert apart(merged(ids), made) <= 2e-5


def test_one_whole_adapter_is_its_own_sum(model, folders, ids, apart):
    adapters = AdapterSet(model)
    with torch.no_grad():
        adapters.load("a", folders / "a")
        alone = model(ids)
        for how in ("cat", "svd", "linear"):
            assert adapters.combine(how, {"a": 1.0}, how, **({"rank": 7} if how == "svd" else {})) <= 1e-6
            assert apart(model(ids), alone) <= 5e-5


REFUSED = {
    "name taken": (lambda m, s, f: s.load("a", f / "a"), "the set holds 'a' already. adapters.delete('a') first"),
    "no such name": (lambda m, s, f: s.switch("z"), "AdapterSet: holds no 'z' (it holds: a (active), p)"),
    "delete": (lambda m, s, f: s.delete("z"), "holds no 'z'"),
    "full tuning": (lambda m, s, f: s.add("x", FullConfig()), "AdapterSet: full changes the base of all adapters"),
    "not LoRA": (lambda m, s, f: s.combine("x", {"a": 1.0, "p": 1.0}), "weights: 'p' is not plain LoRA"),
    "how": (lambda m, s, f: s.combine("x", {"a": 1.0}, "ties"), "how: 'ties' is not known (cat, svd, linear)"),
    "weight": (lambda m, s, f: s.combine("x", {"a": "1"}), "weights 'a': '1' must be"),
    "how a list": (lambda m, s, f: s.combine("x", {"a": 1.0}, ["cat"]), "how: ['cat'] is not known"),
    "name a number": (lambda m, s, f: s.load(5, f / "a"), "name: 5 must be text"),
    "no weight": (lambda m, s, f: s.combine("x", {}), "weights: names no adapter"),
    "rank": (lambda m, s, f: s.combine("x", {"a": 1.0}, "cat", rank=3), "rank: has no meaning for 'cat'"),
    "add_adapter": (lambda m, s, f: add_adapter(m, LoRAConfig(2)), "add_adapter: the model holds lora already"),
    "remove": (lambda m, s, f: minipeft.remove_adapter(m), "remove_adapter: the model's adapters are a set (a ("),
    "merge": (lambda m, s, f: minipeft.merge_adapter(m), "merge_adapter: the model's adapters are a set (a ("),
    "a second set": (lambda m, s, f: AdapterSet(m), "the model holds lora already"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_set_refuses_leaves_it_as_it_was(decoder, ids, stir, tmp_path, case):
    call, said = REFUSED[case]
    model = decoder("llama")
    add_adapter(model, LoRAConfig(2))
    save_adapter(stir(model), tmp_path / "a")
    minipeft.remove_adapter(model)
    adapters = AdapterSet(model)
    adapters.add("a", LoRAConfig(2, init="gaussian"))
    adapters.add("p", PrefixConfig(2, init="peft"))
    adapters.switch("a")
    before = stir(model)(ids), repr(model)
    with pytest.raises(InputError, match=re.escape(said)):
        call(model, adapters, tmp_path)
    assert torch.equal(model(ids), before[0])
    assert repr(model) == before[1]


def test_an_adapter_that_cannot_be_loaded_leaves_the_active_one(decoder, ids, stir, tmp_path):
    model = decoder("llama")
    adapters = AdapterSet(model)
    adapters.add("a", LoRAConfig(2, init="gaussian"))
    before = stir(model)(ids)
    with pytest.raises(InputError, match="no such file"):
        adapters.load("b", tmp_path)
    assert torch.equal(model(ids), before)
    adapters.switch(None)
    with pytest.raises(InputError, match=r"add_adapter: the model's adapters are a set \(a\)\. add, load and delete"):
        add_adapter(model, LoRAConfig(2))
    adapters.close()
    with pytest.raises(InputError, match="AdapterSet: is closed"):
        adapters.switch("a")
    with pytest.raises(InputError, match="disabled: the model holds no adapter"), disabled(model):
        pass


def test_what_disabled_refuses(model, tmp_path):
    add_adapter(model, LoRAConfig(2))
    with disabled(model):
        with pytest.raises(InputError, match="disabled: the model's lora is disabled already"), disabled(model):
            pass
        with pytest.raises(InputError, match=r"add_adapter: the model's lora is disabled\. Leave"):
            add_adapter(model, LoRAConfig(2))
        with pytest.raises(InputError, match="the model holds no adapter"):
            save_adapter(model, tmp_path)
    minipeft.remove_adapter(model)
    add_adapter(model, FullConfig())
    with pytest.raises(InputError, match=r"disabled: full changes the base itself\. Load a second"), disabled(model):
        pass
    minipeft.remove_adapter(model)
    bank = minipeft.AdapterBank(model)
    with pytest.raises(InputError, match="disabled: the model holds a bank of adapters"), disabled(model):
        pass
    bank.close()
