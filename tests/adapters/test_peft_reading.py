"""What a PEFT file says and a loaded adapter does not need: PEFT makes each folder here, and the logits are PEFT's."""

import json
import re
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minipeft.adapters import LoRAConfig, add_adapter, remove_adapter
from minipeft.adapters.bank import AdapterBank
from minipeft.adapters.peft_format import load_adapter, save_adapter
from minipeft.errors import InputError
from minipeft.models.checkpoint import load_model, save_model

transformers.logging.set_verbosity_error()
warnings.filterwarnings("ignore", module="peft")
pytestmark = pytest.mark.filterwarnings("ignore")

BASE = "model.layers.0.self_attn"
lora = lambda **given: peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, **given})
ia3 = lambda **given: peft.IA3Config(task_type="CAUSAL_LM", **given)
ln_tuning = lambda **given: peft.LNTuningConfig(task_type="CAUSAL_LM", **given)
vera = lambda **given: peft.VeraConfig(task_type="CAUSAL_LM", r=8, **given)
QKV, ALL = ["q_proj", "k_proj", "v_proj"], "all-linear"
READ = {  # PEFT's config, keys that another tool adds to it, and the note
    "orthogonal": (lora(init_lora_weights="orthogonal"), {}, "init_lora_weights: 'orthogonal' has no effect"),
    "eva": (lora(init_lora_weights="eva", eva_config=peft.EvaConfig()), {}, "init_lora_weights: 'eva' has no effect"),
    "mica": (lora(init_lora_weights="mica"), {}, "init_lora_weights: 'mica' has no effect"),
    "lora_ga": (lora(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig()), {},
                "init_lora_weights: 'lora_ga' has no effect"),
    "ms-swift": (lora(), {"lorap_emb_lr": 1e-6, "lora_dtype": "bfloat16"}, "lorap_emb_lr: 1e-06 has no effect"),
    "exclude names": (lora(target_modules=QKV, exclude_modules=["k_proj", "1.self_attn.v_proj"]), {}, None),
    "exclude pattern": (lora(target_modules=ALL, exclude_modules=r".*\.(2|mlp)\..*"), {}, None),
    "exclude of the default": (lora(exclude_modules=["0.self_attn.q_proj"]), {}, None),
    "exclude and layers": (lora(target_modules=QKV, exclude_modules=["k_proj"], layers_to_transform=[0, 2]), {}, None),
    "ia3 exclude": (ia3(exclude_modules=["1.mlp.down_proj", "k_proj"]), {}, None),
    "ln_tuning exclude": (ln_tuning(exclude_modules=["1.input_layernorm", "norm"]), {}, None),
    "ln_tuning with one": (ln_tuning(target_modules=["norm", "x"]), {}, "target_modules: 'x' matches nothing"),
    "vera with one": (vera(target_modules=["o_proj", "x"]), {}, "target_modules: 'x' matches nothing"),
    "a name of other models": (lora(target_modules=[*QKV, "W_pack"]), {},
                               "target_modules: 'W_pack' matches nothing in this model"),
    "ia3 with one": (ia3(target_modules=["v_proj", "x"], feedforward_modules=[]), {}, "target_modules: 'x' matches no"),
}  # fmt: skip


@pytest.fixture
def base(decoder, twin):
    """A tiny Llama, its folder, and transformers' of the same weights."""
    model = decoder("llama")
    return model, twin(model)


def saved_by_peft(peer, given, stir, folder: Path, ids, changes=None):
    """A folder that PEFT wrote, with keys that another tool adds; and the logits of PEFT's own reading of it."""
    theirs = stir(peft.get_peft_model(peer, given)).eval()
    theirs.save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (changes or {})))
    again = transformers.AutoModelForCausalLM.from_pretrained(folder.parent / "base", attn_implementation="eager")
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(again.eval(), folder).eval()(ids).logits


@pytest.mark.parametrize("name", READ)
def test_what_has_no_effect_is_read(base, ids, stir, apart, tmp_path, name):
    (model, peer), (given, changes, note) = base, READ[name]
    wanted = saved_by_peft(peer, given, stir, tmp_path / "theirs", ids, changes)
    report = load_adapter(model, tmp_path / "theirs", trainable=True)
    with torch.no_grad():
        ours = model(ids)
        assert apart(ours, wanted) <= 1e-5
    assert any(said.startswith(note) for said in report.notes) if note else report.notes == ()
    save_adapter(model, tmp_path / "ours")
    first, second = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "ours"))
    assert first.keys() == second.keys()
    remove_adapter(model)
    with torch.no_grad():
        assert apart(model(ids), wanted) > 1e-3
        load_adapter(model, tmp_path / "ours")
        assert torch.equal(model(ids), ours)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager").eval()
    with torch.no_grad():
        assert apart(peft.PeftModel.from_pretrained(again, tmp_path / "ours").eval()(ids).logits, wanted) <= 1e-5


def test_a_name_that_matches_nothing_is_still_refused_when_training(base):
    model, _ = base
    with pytest.raises(InputError, match="targets: no linear layer is named 'W_pack'"):
        add_adapter(model, LoRAConfig(4, targets=(*QKV, "W_pack")))


def test_a_pickled_adapter_is_read_where_the_caller_says_so(base, ids, stir, apart, tmp_path):
    model, peer = base
    theirs = stir(peft.get_peft_model(peer, lora(target_modules=QKV))).eval()
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=False)
    assert not (tmp_path / "theirs" / "adapter_model.safetensors").exists()
    said = "holds only adapter_model.bin, a pickle, which is not read. One that you trust is read with legacy_bin=True"
    with pytest.raises(InputError, match=re.escape(said)):
        load_adapter(model, tmp_path / "theirs")
    with pytest.raises(InputError, match="legacy_bin: 'yes' must be true or false"):
        load_adapter(model, tmp_path / "theirs", legacy_bin="yes")
    load_adapter(model, tmp_path / "theirs", legacy_bin=True)
    with torch.no_grad():
        assert apart(model(ids), theirs(ids).logits) <= 1e-5
    remove_adapter(model)
    bank = AdapterBank(model)
    with pytest.raises(InputError, match="a pickle, which is not read"):
        bank.load("x", tmp_path / "theirs")
    bank.close()


class Command:
    """What a pickle may do to whoever loads it."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_a_pickle_that_runs_code_or_is_damaged_is_refused(base, stir, tmp_path, monkeypatch):
    model, peer = base
    monkeypatch.chdir(tmp_path)
    theirs = stir(peft.get_peft_model(peer, lora()))
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=False)
    file = tmp_path / "theirs" / "adapter_model.bin"
    sound = file.read_bytes()
    torch.save({"x": Command()}, file)
    with pytest.raises(InputError, match=r"adapter_model\.bin: cannot be read as weights: damaged, or holds more than"):
        load_adapter(model, tmp_path / "theirs", legacy_bin=True)
    assert not Path("ran").exists()
    file.write_bytes(sound[: len(sound) // 2])
    with pytest.raises(InputError, match=r"adapter_model\.bin: cannot be read as weights"):
        load_adapter(model, tmp_path / "theirs", legacy_bin=True)
    assert model.adapter is None


def test_a_resized_vocabulary_of_one_table_is_named(base, stir, tmp_path):
    model, peer = base
    theirs = stir(peft.get_peft_model(peer, lora(target_modules=["q_proj", "embed_tokens"])))
    theirs.save_pretrained(tmp_path / "theirs")
    file, name = (
        tmp_path / "theirs" / "adapter_model.safetensors",
        "base_model.model.model.embed_tokens.base_layer.weight",
    )
    save_file(load_file(file) | {name: torch.ones(70, 32)}, file)
    said = f"the vocabulary was resized: '{name}' has 70 rows, the model 61. Merge the adapter into its own base"
    with pytest.raises(InputError, match=re.escape(said)):
        load_adapter(model, tmp_path / "theirs")
    save_file(load_file(file) | {name.replace(".base_layer", ""): torch.ones(70, 32)}, file)
    with pytest.raises(InputError, match="the vocabulary was resized, but not of embedding and head alike"):
        load_adapter(model, tmp_path / "theirs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_in_float32_are_gpt2s_own_to_rounding(decoder, ids, tmp_path, dtype):
    """reorder_and_upcast_attn: the error of our logits, against float64, is no larger than that of transformers'."""
    save_model(decoder("gpt2"), tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"reorder_and_upcast_attn": True}))
    read = transformers.AutoModelForCausalLM.from_pretrained
    peer = read(tmp_path, attn_implementation="eager", dtype=dtype).eval()
    assert peer.transformer.h[0].attn.reorder_and_upcast_attn
    file.write_text(json.dumps(json.loads(file.read_text()) | {"reorder_and_upcast_attn": False}))
    with torch.no_grad():
        exact = read(tmp_path, attn_implementation="eager", dtype=dtype).eval().double()(ids).logits
        file.write_text(json.dumps(json.loads(file.read_text()) | {"reorder_and_upcast_attn": True}))
        error = lambda logits: float((logits.double() - exact).square().mean().sqrt())
        ours, theirs = error(load_model(tmp_path, dtype=dtype)(ids)), error(peer(ids).logits)
    assert 0 < ours <= 1.2 * theirs


def test_baked_scales_are_pefts_too(base, ids, stir, apart, tmp_path):
    """save_adapter(baked=True): B holds what rsLoRA and alpha_pattern change of the scale; PEFT computes the same."""
    model, peer = base
    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"0.self_attn.v_proj": 2.0}}
    add_adapter(model, LoRAConfig(4, 6.0, rslora=True, **patterns))
    with torch.no_grad():
        wanted = stir(model)(ids)
    save_adapter(model, tmp_path / "baked", baked=True)
    given = json.loads((tmp_path / "baked" / "adapter_config.json").read_text())
    assert (given["use_rslora"], given["alpha_pattern"]) == (False, {})
    with torch.no_grad():
        assert apart(peft.PeftModel.from_pretrained(peer, tmp_path / "baked").eval()(ids).logits, wanted) <= 1e-5
