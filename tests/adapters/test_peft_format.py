"""Adapter folders against the installed PEFT, both ways; a faulty folder is refused before the model changes."""

import copy
import dataclasses
import json
import math
import re
import warnings

import peft
import pytest
import torch
import transformers
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file

from minipeft.adapters import (
    IA3Config,
    LNTuningConfig,
    LoRAConfig,
    PrefixConfig,
    PromptConfig,
    VeRAConfig,
    add_adapter,
    remove_adapter,
)
from minipeft.adapters.lora import find_lora_layers
from minipeft.adapters.peft_format import load_adapter, save_adapter
from minipeft.data.packing import Batch
from minipeft.errors import InputError
from minipeft.training.loop import TrainConfig, train

transformers.logging.set_verbosity_error()
warnings.filterwarnings("ignore", module="peft")
pytestmark = pytest.mark.filterwarnings("ignore")

ALL = {"gpt2": ["c_attn", "c_proj", "c_fc"],
       "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}  # fmt: skip
PATTERNS = {"gpt2": ("attn.c_proj", "1.mlp.c_fc"), "llama": ("v_proj", "1.mlp.gate_proj")}
REGEX = {"gpt2": r".*\.[02]\.attn\.c_(attn|proj)", "llama": r"model\.layers\.[02]\.self_attn\.(q|o)_proj"}
LAST = {"gpt2": r".*\.(2\.ln_1|ln_f)", "llama": r"model\.(layers\.2\.input_layer)?norm"}
STABLE = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "r", "lora_alpha",
    "lora_dropout", "target_modules", "bias", "fan_in_fan_out", "modules_to_save", "init_lora_weights",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
}  # fmt: skip


def lora_cases(kind):
    """PEFT's arguments and our config for the same adapter, by name."""
    lora = lambda **given: peft.LoraConfig(task_type="CAUSAL_LM", **given)
    first, second = PATTERNS[kind]
    every = {"r": 4, "lora_alpha": 12, "target_modules": ALL[kind]}
    ranks, alphas = {first: 3, second: 6}, {second: 5}
    return {
        "default": (lora(), LoRAConfig(8, 8.0, targets="default")),
        "all-linear": (lora(r=4, lora_alpha=12, target_modules="all-linear"), LoRAConfig(4, 12.0)),
        "patterns": (
            lora(**every, rank_pattern=ranks, alpha_pattern=alphas),
            LoRAConfig(4, 12.0, rank_pattern=ranks, alpha_pattern=alphas),
        ),
        "layers": (lora(**every, layers_to_transform=[0, 2]), LoRAConfig(4, 12.0, layers=(0, 2))),
        "rslora": (
            lora(**every, use_rslora=True, rank_pattern=ranks),
            LoRAConfig(4, 12.0, rslora=True, rank_pattern=ranks),
        ),
        "dora": (lora(**every, use_dora=True), LoRAConfig(4, 12.0, dora=True)),
        "lora_bias": (lora(**every, lora_bias=True), LoRAConfig(4, 12.0, lora_bias=True)),
        "regex": (lora(r=4, lora_alpha=12, target_modules=REGEX[kind]), LoRAConfig(4, 12.0, targets=REGEX[kind])),
    }


def cases(kind):
    inner = {"gpt2": ["mlp.c_proj"], "llama": ["down_proj"]}[kind]
    ia3 = lambda **given: peft.IA3Config(task_type="CAUSAL_LM", **given)
    norms = lambda **given: peft.LNTuningConfig(task_type="CAUSAL_LM", **given)
    vera = lambda **given: peft.VeraConfig(task_type="CAUSAL_LM", **given)
    key = {"projection_prng_key": 5, "save_projection": False}
    return {
        **lora_cases(kind),
        "vera": (vera(r=8), VeRAConfig(8)),
        "vera wide": (
            vera(r=8, target_modules=ALL[kind], layers_to_transform=[0, 2]),
            VeRAConfig(8, targets="all-linear", layers=(0, 2)),
        ),
        "vera from its key": (
            vera(r=8, target_modules=ALL[kind], d_initial=0.3, **key),
            VeRAConfig(8, targets="all-linear", d_initial=0.3, **key),
        ),
        "ln_tuning": (norms(), LNTuningConfig()),
        "ln_tuning regex": (norms(target_modules=LAST[kind]), LNTuningConfig(LAST[kind])),
        "ia3": (ia3(), IA3Config()),
        "ia3 inner": (
            ia3(target_modules=inner, feedforward_modules=inner),
            IA3Config(targets=tuple(inner), feedforward=tuple(inner)),
        ),
        "ia3 outer": (
            ia3(target_modules=ALL[kind], feedforward_modules=[]),
            IA3Config(targets="all-linear", feedforward=()),
        ),
        "prefix": (
            peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
            PrefixConfig(4, init="peft", windowed=True),
        ),
        "prefix projected": (
            peft.PrefixTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=24
            ),
            PrefixConfig(4, init="peft", reparam=24, windowed=True),
        ),
        "prompt": (
            peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
            PromptConfig(4, init="normal", windowed=True),
        ),
    }


NAMES = list(cases("gpt2"))


@pytest.fixture
def pair(model, twin):
    """A tiny decoder, and transformers' of the same weights."""
    return model, twin(model)


def kind_of(family):
    return "gpt2" if family == "gpt2" else "llama"


def logits(peer, ids):
    """The peer's logits of each token of ids, without a prompt's virtual tokens."""
    with torch.no_grad():
        return peer(ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]


@pytest.mark.parametrize("name", NAMES)
def test_what_peft_saves_loads_here_with_its_logits(pair, family, name, ids, stir, apart, tmp_path):
    model, peer = pair
    given, _ = cases(kind_of(family))[name]
    theirs = stir(peft.get_peft_model(peer, given)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = logits(theirs, ids)
    report = load_adapter(model, tmp_path / "theirs")
    with torch.no_grad():
        assert apart(model(ids), wanted) <= 1e-5
        remove_adapter(model)
        assert apart(model(ids), wanted) > 1e-3
    assert report.trainable == 0


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_here_goes_through_peft_and_back_with_equal_bytes(pair, family, name, ids, stir, apart, tmp_path):
    model, peer = pair
    _, config = cases(kind_of(family))[name]
    add_adapter(model, config)
    stir(model)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(peer, tmp_path / "ours").eval()
    with torch.no_grad():
        wanted = model(ids)
        assert apart(logits(theirs, ids), wanted) <= 1e-5
        theirs.save_pretrained(tmp_path / "theirs")
        remove_adapter(model)
        load_adapter(model, tmp_path / "theirs", trainable=True)
        assert torch.equal(model(ids), wanted)
    save_adapter(model, tmp_path / "again")
    first, second, third = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "theirs", "again"))
    assert first.keys() == second.keys() == third.keys()
    for key, tensor in first.items():
        assert tensor.numpy().tobytes() == second[key].numpy().tobytes() == third[key].numpy().tobytes()
    ours, again = (json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("ours", "again"))
    assert ours == again
    if ours["peft_type"] == "LORA":
        assert set(ours) - ({"lora_bias"} if ours.get("lora_bias") else set()) == STABLE
    assert set(ours) <= set(given.name for given in dataclasses.fields(type(cases(kind_of(family))[name][0])))


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_is_saved_as_plain_lora_that_peft_reads(pair, ids, stir, apart, rslora, tmp_path):
    model, peer = pair
    ends = {path.rsplit(".", 1)[-1] for path in lora_paths(model)}
    end = min(ends)
    add_adapter(model, LoRAConfig(3, 6.0, init="pissa", rslora=rslora, rank_pattern={end: 2}, alpha_pattern={end: 1.5}))
    stir(model)
    save_adapter(model, tmp_path / "ours")
    given = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert given["init_lora_weights"] is True
    assert given["r"] == 6
    before = copy.deepcopy(peer.state_dict())
    theirs = peft.PeftModel.from_pretrained(peer, tmp_path / "ours").eval()
    base = theirs.unload().state_dict()
    assert all(torch.equal(before[key], base[key]) for key in before)
    theirs = peft.PeftModel.from_pretrained(peer, tmp_path / "ours").eval()
    with torch.no_grad():
        wanted = model(ids)
    assert apart(logits(theirs, ids), wanted) <= 1e-5
    remove_adapter(model)
    load_adapter(model, tmp_path / "ours")
    with torch.no_grad():
        assert apart(model(ids), wanted) <= 1e-5


def lora_paths(model):
    add_adapter(model, LoRAConfig(1))
    paths = list(find_lora_layers(model))
    remove_adapter(model)
    return paths


def test_pissa_starts_as_pefts(pair, tmp_path):
    model, peer = pair
    theirs = peft.get_peft_model(
        peer,
        peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=ALL[kind_of(model.config.model_type)], init_lora_weights="pissa"
        ),
    )
    add_adapter(model, LoRAConfig(4, 8.0, init="pissa"))
    modules = dict(theirs.named_modules())
    for path, layer in find_lora_layers(model).items():
        twin = modules[f"base_model.model.{path}"]
        update = twin.lora_B["default"].weight @ twin.lora_A["default"].weight
        torch.testing.assert_close(layer.lora_B @ layer.lora_A, update, rtol=1e-4, atol=1e-5)


def test_dora_trains_as_pefts(pair, ids, stir, apart):
    model, peer = pair
    theirs = stir(peft.get_peft_model(peer, cases(kind_of(model.config.model_type))["dora"][0]), scale=0.0)
    add_adapter(model, LoRAConfig(4, 12.0, dora=True))
    modules = dict(theirs.named_modules())
    twins = {path: modules[f"base_model.model.{path}"] for path in find_lora_layers(model)}
    tensors = lambda twin: {
        "lora_A": twin.lora_A["default"].weight,
        "lora_B": twin.lora_B["default"].weight,
        "lora_magnitude_vector": twin.lora_magnitude_vector["default"].weight,
    }
    with torch.no_grad():
        for path, layer in find_lora_layers(model).items():
            layer.lora_B.normal_(std=0.2)
            for name, tensor in tensors(twins[path]).items():
                tensor.copy_(getattr(layer, name))
    model(ids).logsumexp(dim=-1).sum().backward()
    theirs.train()(ids).logits.logsumexp(dim=-1).sum().backward()
    for path, layer in find_lora_layers(model).items():
        for name, tensor in tensors(twins[path]).items():
            assert apart(getattr(layer, name).grad, tensor.grad) <= 2e-4, (path, name)


def test_lora_plus_trains_as_pefts(pair, family, ids):
    model, peer = pair
    add_adapter(model, LoRAConfig(4, 12.0))
    theirs = peft.get_peft_model(peer, cases(kind_of(family))["all-linear"][0])
    modules = dict(theirs.named_modules())
    twins = {path: modules[f"base_model.model.{path}"] for path in find_lora_layers(model)}
    with torch.no_grad():
        for path, layer in find_lora_layers(model).items():
            twins[path].lora_A["default"].weight.copy_(layer.lora_A)
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.0
    )
    for _ in range(3):
        optimizer.zero_grad()
        theirs(ids, labels=ids).loss.backward()
        optimizer.step()
    batch = Batch(ids, torch.cat([torch.full((2, 1), -100), ids[:, 1:]], dim=1), torch.zeros_like(ids))
    settings = TrainConfig(
        3, learning_rate=1e-3, warmup=0, decay="constant", beta2=0.999, clip=1e9, lr_multipliers={"lora_B": 8.0}
    )
    assert [step.number for step in train(model, [batch] * 3, settings)] == [1, 2, 3]
    for path, layer in find_lora_layers(model).items():
        torch.testing.assert_close(layer.lora_A, twins[path].lora_A["default"].weight, rtol=0, atol=2e-5)
        torch.testing.assert_close(layer.lora_B, twins[path].lora_B["default"].weight, rtol=0, atol=2e-4)
        assert layer.lora_B.abs().max() > 0.01


# What is wrong with a folder. Each entry: how a sound folder of PEFT's is spoilt, and what the error has to say.


def config(**changes):
    """Change keys of adapter_config.json; ... removes one."""

    def spoil(folder):
        file = folder / "adapter_config.json"
        given = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in given.items() if value is not ...}))

    return spoil


def tensors(change):
    """Change the tensors of adapter_model.safetensors."""

    def spoil(folder):
        file = folder / "adapter_model.safetensors"
        held = load_file(file)
        held = change(held) or held
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, file, metadata={"format": "pt"})

    return spoil


def bytes_of(name, change):
    def spoil(folder):
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return spoil


def first(held, ending):
    return next(name for name in held if name.endswith(ending))


def pickled(folder):
    held = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(held, folder / "adapter_model.bin")


Q = "model.layers.0.self_attn.q_proj"
JSON, DATA = "adapter_config.json", "adapter_model.safetensors"
EVIL = r"(([a-z]|\d|_|\.)+)+!"
BAD = {
    "A01 config missing": (lambda f: (f / JSON).unlink(), "adapter_config.json: no such file"),
    "A01 weights missing": (lambda f: (f / DATA).unlink(), "adapter_model.safetensors: no such file"),
    "A01 not JSON": (bytes_of(JSON, lambda b: b[:-9]), "adapter_config.json: not valid JSON: line"),
    "A01 a list": (bytes_of(JSON, lambda b: b"[]"), "adapter_config.json: must hold a JSON object"),
    "A02 peft_type": (config(peft_type="FOO"), "json: peft_type: 'FOO' is not supported (LORA, IA3, PREFIX_TUNING"),
    "A02 no peft_type": (config(peft_type=...), "json: peft_type: None is not supported"),
    "A02 a list": (config(peft_type=["LORA"]), "json: peft_type: ['LORA'] is not supported"),
    "A03 r null": (config(r=None), "json: r: None must be an integer >= 1"),
    "A03 r 4.0": (config(r=4.0), "json: r: 4.0 must be an integer >= 1"),
    "A03 r 0": (config(r=0), "json: r: 0 must be an integer >= 1"),
    "A04 r -4": (config(r=-4), "json: r: -4 must be an integer >= 1"),
    "A05 r text": (config(r="4"), "json: r: '4' must be an integer >= 1"),
    "A05 r true": (config(r=True), "json: r: True must be an integer >= 1"),
    "A06 r vast": (config(r=10**9), f"{Q}.lora_A.weight': shape [4, 32], want [1000000000, 32]"),
    "A07 alpha NaN": (config(lora_alpha=math.nan), "json: NaN is not JSON"),
    "A07 alpha 0": (config(lora_alpha=0), "json: lora_alpha: 0 must be finite and > 0"),
    "A08 alpha text": (config(lora_alpha="8"), "json: lora_alpha: '8' must be finite and > 0"),
    "A09 one target of two": (config(target_modules=["q_proj", "nope"]),
                              "safetensors: unexpected tensors: base_model.model.model.layers.0.self_attn.v_proj"),
    "A09 no target of two": (config(target_modules=["neither", "nope"]),
                             "json: target_modules: no linear layer is named 'neither'; this model has ['down_proj'"),
    "A09 pattern": (config(target_modules="nope.*"), "json: target_modules: 'nope.*' matches no linear layer"),
    "A09 a number": (config(target_modules=[1]), "json: target_modules: [1] must be a list of names"),
    "A09 embedding": (config(target_modules=["embed_tokens"]), "no adapter tensors recognised; the first is"),
    "A10 ReDoS": (config(target_modules=EVIL), "took longer than 0.5 s to match"),
    "A10 ReDoS in rank_pattern": (config(rank_pattern={EVIL: 4}), "json: rank_pattern: '(([a-z]"),
    "A11 invalid regex": (config(target_modules="(q_proj"), "is not a regular expression: missing )"),
    "A11 invalid rank_pattern": (config(rank_pattern={"[": 4}), "json: rank_pattern: '[' is not a regular expression"),
    "A12 target left out": (config(target_modules=["q_proj"]), "safetensors: unexpected tensors: base_model"),
    "A13 bias": (config(bias="some"), "json: bias: 'some' is not known (none, lora_only, all)"),
    "A13 modules_to_save": (config(modules_to_save=["lm_head"]), "missing tensors: base_model.model.lm_head.weight (1"),
    "A13 modules_to_save of LoRA": (config(modules_to_save=["q_proj"]), "modules_to_save: 'model.layers.0.self_attn.q"),
    "A13 modules_to_save, a text": (config(modules_to_save="lm_head"), "json: modules_to_save: 'lm_head' must be"),
    "A13 exclude_modules": (config(exclude_modules=5), "json: exclude_modules: 5 must be a list"),
    "A13 all excluded": (config(exclude_modules=["q_proj", "v_proj"]), "json: exclude_modules: ['q_proj', 'v_proj']"),
    "A13 one excluded": (config(exclude_modules=["q_proj"]), "unexpected tensors: base_model.model.model.layers.0"),
    "A13 ReDoS": (config(exclude_modules=EVIL), "json: exclude_modules: '(([a-z]"),
    "A13 trainable tokens": (config(trainable_token_indices=[1]), "missing tensors: base_model.model.model.embed_tok"),
    "A13 a token of none": (config(trainable_token_indices=[9999]), "trainable_token_indices: there is no token 9999"),
    "A13 a token twice": (config(trainable_token_indices=[7, 7]), "trainable_token_indices: names a token twice"),
    "A13 tokens, a text": (config(trainable_token_indices="7"), "trainable_token_indices: '7' must be a list of"),
    "A13 three tables": (config(trainable_token_indices={"a": [1], "b": [2]}), "an embedding and a head at most"),
    "A13 target_parameters": (config(target_parameters=["a"]), "json: target_parameters: ['a'] is not supported"),
    "A13 layer_replication": (config(layer_replication=[[0, 1]]), "json: layer_replication: [[0, 1]] is not supported"),
    "A13 bdlora": (config(use_bdlora={"nblocks": 2}), "json: use_bdlora: {'nblocks': 2} is not supported"),
    "A13 alora": (config(alora_invocation_tokens=[1]), "json: alora_invocation_tokens: [1] is not supported"),
    "A14 rslora text": (config(use_rslora="yes"), "json: use_rslora: 'yes' must be true or false"),
    "A14 dora without magnitudes": (config(use_dora=True), "missing tensors: base_model.model.model.layers.0"),
    "A15 dropout": (config(lora_dropout=1.5), "json: lora_dropout: 1.5 must be in [0, 1)"),
    "A16 unknown field": (config(use_magic=True), "json: use_magic: unknown field with value True"),
    "A17 megatron_core": (config(megatron_core="os"), "json: megatron_core: 'os' is not supported"),
    "A17 megatron_config": (config(megatron_config={}), "json: megatron_config: {} is not supported"),
    "A18 pissa": (config(init_lora_weights="pissa"), "json: init_lora_weights: 'pissa' is not supported"),
    "A19 loftq": (config(loftq_config={"loftq_bits": 4}), "json: loftq_config: {'loftq_bits': 4} is not supported"),
    "A20 layers_pattern": (config(layers_pattern="h", layers_to_transform=[0]), "json: layers_pattern: 'h' is not"),
    "A20 pattern alone": (config(layers_pattern="layers"), "json: layers_pattern: has no meaning without"),
    "A20 no such layer": (config(layers_to_transform=[0, 9]), "json: layers_to_transform: no layer 9: this model"),
    "A20 layers text": (config(layers_to_transform=["0"]), "json: layers_to_transform: '0' must be an integer"),
    "A20 rank_pattern matches nothing": (config(rank_pattern={"nope": 4}), "json: rank_pattern: 'nope' matches none"),
    "A20 rank_pattern list": (config(rank_pattern=[4]), "json: rank_pattern: [4] is not an object"),
    "A20 alpha_pattern text": (config(alpha_pattern={"q_proj": "1"}), "json: alpha_pattern 'q_proj': '1' must be"),
    "A20 layers an object": (config(layers_to_transform={"0": 1}), "json: layers_to_transform: {'0': 1} must be a"),
    "A20 layer true": (config(layers_to_transform=True), "json: layers_to_transform: True must be an integer"),
    "A21 empty name": (config(target_modules=[""]), "json: target_modules: ('',) names no linear layer"),
    "A21 an object": (config(target_modules={"q_proj": 1}), "json: target_modules: {'q_proj': 1} must be a list of"),
    "A21 no target": (config(target_modules=[]), "json: target_modules: () names no linear layer"),
    "key twice": (bytes_of(JSON, lambda b: b'{"r": 4,' + b.lstrip()[1:]), "json: key 'r' given twice"),
    "W01 rank": (config(r=5), f"safetensors: tensor 'base_model.model.{Q}.lora_A.weight': shape [4, 32], want [5, 32]"),
    "W02 lora_B missing": (tensors(lambda t: {k: v for k, v in t.items() if "2.self_attn.v_proj.lora_B" not in k}),
                           "missing tensors: base_model.model.model.layers.2.self_attn.v_proj.lora_B"),
    "W03 layer 99": (tensors(lambda t: {k.replace("layers.2.", "layers.99."): v for k, v in t.items()}),
                     "missing tensors: base_model.model.model.layers.2"),
    "W03 a layer too many": (tensors(lambda t: t | {first(t, "A.weight").replace(".0.", ".9."): torch.ones(2)}),
                             "unexpected tensors: base_model.model.model.layers.9."),
    "W04 NaN": (tensors(lambda t: t[first(t, "B.weight")].view(-1)[3:4].fill_(math.nan) and None), "holds NaN or Inf"),
    "W05 Inf": (tensors(lambda t: t[first(t, "A.weight")].view(-1)[3:4].fill_(math.inf) and None), "holds NaN or Inf"),
    "W06 int64": (tensors(lambda t: {k: v.long() for k, v in t.items()}), "dtype I64, want F32/F16/BF16/F64"),
    "W07 other prefix": (tensors(lambda t: {k.replace("base_model", "x"): v for k, v in t.items()}),
                         "no adapter tensors recognised; the first is 'x.model.model.layers.0."),
    "W08 no prefix": (tensors(lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()}),
                      "no adapter tensors recognised; the first is 'model.layers.0."),
    "W09 twice": (tensors(lambda t: t | {first(t, "A.weight").replace(".w", ".default.w"): torch.ones(4, 32)}),
                  "a tensor is there twice"),
    "W10 width": (tensors(lambda t: {k: v[:, :-1] if k.endswith("A.weight") else v for k, v in t.items()}),
                  "want [4, 32]. Is the adapter for another model?"),
    "W11 pickle": (pickled, "holds only adapter_model.bin, a pickle, which is not read"),
    "W14 vocabulary": (tensors(lambda t: t | {"base_model.model.lm_head.weight": torch.ones(70, 32)}),
                       "the vocabulary was resized, but not of embedding and head alike: {'lm_head': 70}"),
    "W12 truncated": (bytes_of(DATA, lambda b: b[:-1]), "safetensors: data incomplete: needs"),
    "W12 half": (bytes_of(DATA, lambda b: b[: len(b) // 2]), "safetensors: data incomplete"),
    "W13 empty": (bytes_of(DATA, lambda b: b""), "safetensors: too short to be safetensors: 0 bytes"),
}  # fmt: skip


@pytest.fixture
def sound(decoder, stir, tmp_path):
    """A folder with a LoRA of rank 4 on q_proj and v_proj."""
    model = decoder("llama")
    add_adapter(model, LoRAConfig(4, 8.0, targets=["q_proj", "v_proj"]))
    save_adapter(stir(model), tmp_path / "sound")
    return tmp_path / "sound"


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said_and_the_model_is_not_touched(decoder, sound, monkeypatch, name):
    spoil, said = BAD[name]
    spoil(sound)
    monkeypatch.setattr("minipeft.adapters.patterns.DEADLINE", 0.5)
    model = decoder("llama")
    before, shown = copy.deepcopy(model.state_dict()), repr(model)
    trains = {key: p.requires_grad for key, p in model.named_parameters()}
    with pytest.raises(InputError, match=re.escape(said)) as raised:
        load_adapter(model, sound)
    assert str(raised.value).startswith(str(sound))
    assert repr(model) == shown
    assert model.adapter is None
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert {key: p.requires_grad for key, p in model.named_parameters()} == trains


GOOD = {
    "W09 keys of an old PEFT": tensors(lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()}),
    "only what is required": bytes_of(
        JSON, lambda b: b'{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}'
    ),
    "PEFT's default targets": config(target_modules=None),
    "a field of tomorrow at rest": config(use_magic=False, magic_config=None),
    "dropout": config(lora_dropout=0.1),
    "what is excluded is no linear": config(exclude_modules=["0.mlp"]),
    "a pattern that excludes nothing here": config(exclude_modules=r".*\.mlp\..*"),
    "one layer number": config(layers_to_transform=[0, 1, 2], layers_pattern=["layers"]),
}


@pytest.mark.parametrize("spoil", GOOD.values(), ids=list(GOOD))
def test_what_makes_no_difference_is_accepted(decoder, sound, spoil):
    spoil(sound)
    model = decoder("llama")
    load_adapter(model, sound)
    assert len(find_lora_layers(model)) == 6


def test_doubles_are_narrowed_with_a_note_and_another_base_is_noted(decoder, sound):
    tensors(lambda t: {k: v.double() for k, v in t.items()})(sound)
    config(base_model_name_or_path="somebody/large")(sound)
    model = decoder("llama")
    model.source = "/models/small"
    report = load_adapter(model, sound)
    assert report.notes == ("trained on somebody/large, loaded on /models/small", "float64 in the file, float32 here")
    assert "note       trained on somebody/large" in str(report)


def test_a_prefix_of_another_length_or_another_model_is_refused(decoder, sound):
    model = decoder("llama")
    add_adapter(model, PrefixConfig(4, init="peft"))
    save_adapter(model, sound)
    config(num_virtual_tokens=5)(sound)
    (sound / "minipeft_adapter.json").unlink()
    with pytest.raises(InputError, match=r"'prompt_embeddings': shape \[4, 96\], want \[5, 96\]"):
        load_adapter(decoder("llama"), sound)
    config(num_virtual_tokens=4, num_layers=...)(sound)
    with pytest.raises(InputError, match=r"shape \[4, 96\], want \[4, 64\]\. Is the adapter for another model"):
        load_adapter(decoder("llama", num_hidden_layers=2), sound)


def test_a_table_of_equal_width_for_another_shape_is_refused(decoder, sound):
    """3 layers of 2 key/value heads and 6 layers of one have tables of 96 numbers a token, read differently."""
    model, other = decoder("llama"), {"num_hidden_layers": 6, "num_key_value_heads": 1}
    add_adapter(model, PrefixConfig(4, init="peft"))
    save_adapter(model, sound)
    (sound / "minipeft_adapter.json").unlink()
    for name, here, wanted in (("num_attention_heads", 2, 1), ("num_layers", 3, 6), ("token_dim", 16, 8)):
        said = f"{here}, but this model needs {wanted}"
        again = decoder("llama", **other)
        with pytest.raises(InputError, match=rf"json: {name}: {said}\. Is the adapter for another model\?"):
            load_adapter(again, sound)
        assert again.adapter is None
        config(**{name: ...})(sound)
    load_adapter(decoder("llama"), sound)  # without these keys the table is read as this model's
    config(num_layers="3")(sound)
    with pytest.raises(InputError, match="num_layers: '3', but this model needs 3"):
        load_adapter(decoder("llama"), sound)


def test_a_prompt_for_another_model_is_refused(decoder, sound):
    model = decoder("llama")
    add_adapter(model, PromptConfig(4, init="normal"))
    save_adapter(model, sound)
    with pytest.raises(InputError, match="num_layers: 3, but this model needs 2"):
        load_adapter(decoder("llama", num_hidden_layers=2), sound)
    config(num_layers=..., token_dim=64)(sound)
    with pytest.raises(InputError, match="token_dim: 64, but this model needs 32"):
        load_adapter(decoder("llama"), sound)


def test_trainable_and_frozen(decoder, sound):
    model = decoder("llama")
    load_adapter(model, sound)
    assert not any(p.requires_grad for p in model.parameters())
    remove_adapter(model)
    report = load_adapter(model, sound, trainable=True)
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(".lora_" in name for name in trains)
    assert len(trains) == 12
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_an_adapter_on_an_adapter_is_refused(decoder, sound):
    model = decoder("llama")
    load_adapter(model, sound)
    with pytest.raises(InputError, match="the model holds lora already"):
        load_adapter(model, sound)


def test_what_cannot_be_saved(decoder, tmp_path):
    model = decoder("llama")
    with pytest.raises(InputError, match=r"save_adapter: the model holds no adapter\. save_model"):
        save_adapter(model, tmp_path / "out")
    add_adapter(model, LoRAConfig(2))
    layer = next(iter(find_lora_layers(model).values()))
    with torch.no_grad():
        layer.lora_B[0, 0] = math.nan
    with pytest.raises(InputError, match=r"q_proj\.lora_B\.weight: holds NaN or Inf, and is not saved"):
        save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
