"""Trained parts of the base: packed, checkpointed, cached, cast, copied, disabled, switched, planned and resumed."""

import copy
import itertools
import json
import re

import pytest
import torch

import minipeft
from minipeft.adapters import LoRAConfig, add_adapter, remove_adapter
from minipeft.adapters.bank import AdapterBank
from minipeft.adapters.inspection import describe
from minipeft.adapters.peft_format import load_adapter, save_adapter
from minipeft.adapters.switching import AdapterSet, disabled
from minipeft.cli import main
from minipeft.errors import InputError
from minipeft.models.checkpoint import load_model
from minipeft.models.quantized import quantize_model
from minipeft.runs import finetune as tuning
from minipeft.runs.config import run_config
from minipeft.runs.planning import plan
from minipeft.training.loop import TrainConfig, train
from tests.small import write_pairs, write_small_model

Q = ("attn.c_attn", "wte"), ("q_proj", "embed_tokens")  # target and embedding, of GPT-2 and of the others
PARTS = {
    "modules": lambda q, e: LoRAConfig(2, targets=(q,), bias="all", modules_to_save=(e, "lm_head", "0.mlp")),
    "LoRA on tables": lambda q, e: LoRAConfig(2, targets=(q, e, "lm_head"), bias="lora_only"),
    "DoRA on the head": lambda q, e: LoRAConfig(2, targets=(q, "lm_head"), dora=True, bias="all"),
    "rows": lambda q, e: LoRAConfig(2, targets=(q,), trainable_token_indices=tuple(range(0, 61, 2))),
    "vocabulary": lambda q, e: LoRAConfig(2, targets=(q,), vocabulary=64, init="pissa", bias="lora_only"),
}


@pytest.fixture(params=["gpt2", "llama"])
def family(request):
    return request.param


@pytest.fixture(params=PARTS)
def config(request, family):
    return PARTS[request.param](*Q[family != "gpt2"])


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request, decoder, family):
    return decoder(family, tie_word_embeddings=request.param)


def gradients(model, batches):
    model.zero_grad(set_to_none=True)
    total = sum(int((b.labels[:, 1:] != -100).sum()) for b in batches)
    loss = sum(model.loss(b.ids, b.labels, b.documents) for b in batches) / total
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_packed_is_separate_and_checkpointed_is_not(base, config, packed, separate, stir, apart):
    add_adapter(base, config)
    stir(base)
    loss, gradient = gradients(base, [packed])
    for batches, checkpointing in ((separate, False), ([packed], True)):
        base.train().activation_checkpointing = checkpointing
        again, other = gradients(base, batches)
        assert abs(again - loss) <= 1e-5 * loss
        assert all(apart(other[name], gradient[name]) <= 1e-4 for name in gradient)
    hidden = base.hidden(packed.ids, packed.documents)
    logits = base.logits(hidden)[:, :-1].double()  # plain autograd over all logits, in float64
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), packed.labels[:, 1:].flatten(), reduction="mean")
    assert abs(plain - loss) <= 1e-5 * loss


def test_only_the_parts_move_and_removing_them_restores_the_base(base, config, packed, ids):
    before, shown, held = copy.deepcopy(base.state_dict()), repr(base), dict(base.named_parameters())
    with torch.no_grad():
        plain = base(ids)
    add_adapter(base, config)
    base.eval()
    start = copy.deepcopy(base.state_dict())
    trainable = {name for name, p in base.named_parameters(remove_duplicate=False) if p.requires_grad}
    for _ in train(base, [packed] * 3, TrainConfig(3, learning_rate=1e-2)):
        pass
    moved = {name for name, tensor in base.state_dict().items() if not torch.equal(tensor, start[name])}
    assert moved == trainable
    with torch.no_grad(), disabled(base):
        assert torch.equal(base(ids), plain)
        assert base.config.vocab_size == 61
    assert base.config.vocab_size == (config.vocabulary or 61)
    remove_adapter(base)
    assert all(torch.equal(t, before[name]) for name, t in base.state_dict().items())
    assert repr(base) == shown
    assert all(p is held[name] and p.requires_grad for name, p in base.named_parameters())


def test_casts_copies_and_the_cache(base, config, ids, stir, apart):
    add_adapter(base, config)
    stir(base)
    kept = {name: p.clone() for name, p in base.named_parameters() if p.requires_grad}
    base.to(torch.bfloat16)
    held = {name: p for name, p in base.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 and torch.equal(p, kept[name]) for name, p in held.items())
    assert base(ids).dtype == torch.bfloat16
    base.loss(ids, ids).backward()
    assert all(p.grad.dtype == torch.float32 for p in held.values())
    twin = copy.deepcopy(base)
    with torch.no_grad():
        assert torch.equal(twin(ids), base(ids))
        assert not {t.data_ptr() for t in base.parameters()} & {t.data_ptr() for t in twin.parameters()}
        base.float()
        whole, cache = base(ids), base.new_cache(2, 30)
        parts = [base(ids[:, :20], cache=cache), *(base(ids[:, i : i + 1], cache=cache) for i in range(20, 30))]
        assert apart(torch.cat(parts, dim=1), whole) <= 1e-5


def test_sets_hold_them_and_plain_lora_alone_is_combined_or_banked(decoder, ids, stir, tmp_path):
    model = decoder("llama", tie_word_embeddings=True)
    with torch.no_grad():
        plain, adapters, wanted = model(ids), AdapterSet(model), {}
        for name, make in PARTS.items():
            adapters.add(name, make(*Q[1]))
            wanted[name] = stir(model)(ids)
            save_adapter(model, tmp_path / name)
        for name in (*reversed(PARTS), *PARTS):
            adapters.switch(name)
            assert torch.equal(model(ids), wanted[name])
        adapters.add("plain", LoRAConfig(2, targets=("q_proj",)))
        for name in PARTS:
            with pytest.raises(InputError, match=f"weights: '{name}' is not plain LoRA, and is not combined"):
                adapters.combine("both", {"plain": 1.0, name: 1.0})
        adapters.add("head", LoRAConfig(2, targets=("q_proj", "lm_head")))
        tuned = stir(model)(ids)
        assert adapters.combine("again", {"head": 1.0}) <= 1e-6
        torch.testing.assert_close(model(ids), tuned, rtol=1e-4, atol=1e-4)
        adapters.close()
        assert torch.equal(model(ids), plain)
    bank = AdapterBank(model)
    for name in PARTS:
        with pytest.raises(InputError, match="a bank takes"):
            bank.load(name, tmp_path / name)


WRONG = {
    "no name": ({"modules_to_save": ("nope",)}, "modules_to_save: no module is named 'nope'; this model has ["),
    "empty": ({"modules_to_save": ("",)}, "modules_to_save: no module is named ''"),
    "target": ({"modules_to_save": ("mlp",)}, "modules_to_save: 'model.layers.0.mlp.gate_proj' is also a target"),
    "bias": ({"bias": "every"}, "bias: 'every' is not known (none, lora_only, all)"),
    "vocabulary": ({"vocabulary": 0}, "vocabulary: 0 must be an integer >= 1"),
    "vocabulary and rows": ({"vocabulary": 70, "trainable_token_indices": (1,)}, "vocabulary: trains whole tables, so"),
    "vocabulary and target": ({"vocabulary": 70, "targets": ("lm_head",)}, "'lm_head' is also a target"),
    "no token": ({"trainable_token_indices": (61,)}, "trainable_token_indices: there is no token 61: the vocabulary h"),
    "twice": ({"head_token_indices": (3, 3)}, "head_token_indices: names a token twice"),
    "rows and module": ({"trainable_token_indices": (3,), "modules_to_save": ("embed_tokens",)},
                        "trainable_token_indices: 'model.embed_tokens' is also in modules_to_save"),
    "rows and target": ({"head_token_indices": (3,), "targets": ("lm_head",)}, "'lm_head' is also a target"),
    "DoRA of an embedding": ({"targets": ("embed_tokens",), "dora": True}, "'model.embed_tokens' is an embedding"),
    "PiSSA of an embedding": ({"targets": ("embed_tokens",), "init": "pissa"}, "no DoRA, lora_bias or init 'pissa'"),
    "layers": ({"targets": ("q_proj", "lm_head"), "layers": (0,)}, "layers: cannot be combined with the target"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "said"), WRONG.values(), ids=list(WRONG))
def test_what_is_wrong_is_said_and_touches_nothing(decoder, given, said):
    model = decoder("llama")
    shown = repr(model)
    with pytest.raises(InputError, match=re.escape(said)):
        add_adapter(model, LoRAConfig(**{"rank": 2} | given))
    assert repr(model) == shown
    assert model.adapter is None


def test_a_quantized_linear_is_not_trained_whole_but_its_bias_is(decoder, ids, stir):
    model = decoder("llama", mlp_bias=True)
    quantize_model(model, "int8")
    with pytest.raises(InputError, match=r"modules_to_save: 'model\.layers\.0\.mlp\.up_proj' is quantized"):
        add_adapter(model, LoRAConfig(2, targets=("q_proj",), modules_to_save=("up_proj",)))
    with torch.no_grad():
        plain = model(ids)
        add_adapter(model, LoRAConfig(2, targets=("q_proj",), bias="all", modules_to_save=("lm_head",)))
        assert torch.equal(model(ids), plain)
        assert not torch.equal(stir(model)(ids), plain)
        remove_adapter(model)
        assert torch.equal(model(ids), plain)


def test_a_note_says_that_training_unties(decoder):
    said = "the base ties embedding and head; the adapter changes lm_head apart from it, and merging unties them"
    for tied, given in ((True, {"modules_to_save": ("lm_head",)}), (True, {"targets": ("lm_head",)}), (False, {})):
        model = decoder("llama", tie_word_embeddings=tied)
        assert (said in add_adapter(model, LoRAConfig(2, **given)).notes) is tied
    assert add_adapter(decoder("gpt2"), LoRAConfig(2, trainable_token_indices=(3,))).notes == ()


def test_a_merge_that_is_not_finite_leaves_the_tie(decoder):
    model = decoder("llama", tie_word_embeddings=True)
    add_adapter(model, LoRAConfig(2, modules_to_save=("lm_head", "norm")))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.lm_head.saved_weight[3, 4] = float("nan")
    with pytest.raises(InputError, match="cannot merge into 'lm_head': the merged weight would not be finite"):
        minipeft.merge_adapter(model)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.embedding.weight
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items() if name != "lm_head.saved_weight")


def test_a_table_of_another_base_is_refused(decoder, stir, tmp_path):
    """PEFT writes the base's own embedding beside LoRA on it, and puts it in the place of the model's when loading."""
    from safetensors.torch import load_file, save_file

    model = decoder("llama")
    add_adapter(model, LoRAConfig(2, targets=("embed_tokens",)))
    save_adapter(stir(model), tmp_path)
    remove_adapter(model)
    file, name = tmp_path / "adapter_model.safetensors", "base_model.model.model.embed_tokens.base_layer.weight"
    save_file(load_file(file) | {name: model.embedding.weight.detach().bfloat16()}, file)
    with pytest.raises(InputError, match=f"tensor '{name}': is not the base's. Merge the adapter into its own base"):
        load_adapter(model, tmp_path)
    assert model.adapter is None
    load_adapter(model.to(torch.bfloat16), tmp_path)


@pytest.mark.parametrize("name", PARTS)
def test_plan_and_inspect_count_them(decoder, name, stir, tmp_path):
    model, config = decoder("llama"), PARTS[name](*Q[1])
    report = add_adapter(model, config)
    planned = plan(model.config if config.vocabulary is None else decoder("llama").config, config, length=32)
    assert (planned.trainable, planned.total) == (report.trainable, report.total)
    save_adapter(stir(model), tmp_path)
    told = describe(tmp_path)
    whole = {"modules": ["embed_tokens", "lm_head", "0.mlp"], "vocabulary": ["embed_tokens", "lm_head"]}
    assert told["trained whole"] == whole.get(name)
    assert (told["trained rows"] is not None) == (name == "rows")
    assert told["bias"] == (None if config.bias == "none" else config.bias)


@pytest.mark.parametrize("given", [
    {"modules_to_save": ["lm_head", "wte", "ln_f"], "bias": "all", "dropout": 0.1},
    {"targets": ["c_attn", "wte", "lm_head"], "dropout": 0.1},
    {"trainable_token_indices": list(range(0, 257, 2))},
], ids=["modules", "LoRA on tables", "rows"])  # fmt: skip
def test_a_run_resumes_to_the_same_bytes(given, tmp_path, monkeypatch):
    write_small_model(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl")
    data = run_config("lora", model=str(tmp_path / "model"), data=str(tmp_path / "pairs.jsonl"), held_out=0,
                               steps=4, save_every=2, length=48, rank=2, **given)  # fmt: skip
    whole = tuning.finetune(data, tmp_path / "whole", say=lambda _: None)
    right = tuning.train

    def cut_off(*arguments):
        yield from itertools.islice(right(*arguments), 3)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "train", cut_off)
        with pytest.raises(KeyboardInterrupt):
            tuning.finetune(data, tmp_path / "parts", say=lambda _: None)
    again = tuning.finetune(data, tmp_path / "parts", resume=True, say=lambda _: None)
    assert (again["resumed_at"], again["loss"]) == (2, whole["loss"])
    first, second = (tmp_path / name / "adapter" for name in ("whole", "parts"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    model = load_model(tmp_path / "model")
    load_adapter(model, first, trainable=True)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == whole["trainable"]


def test_the_command_line_names_them(tmp_path, capsys):
    write_small_model(tmp_path / "model")
    file = tmp_path / "pairs.jsonl"
    write_pairs(file)
    run = ["train", "--model", str(tmp_path / "model"), "--method", "lora", "--data", str(file), "--held-out", "0",
           "--steps", "1", "--length", "48", "--out", str(tmp_path / "run")]  # fmt: skip
    assert main([*run, "--modules-to-save", "c_fc", "--modules-to-save", "ln_f", "--targets", "c_attn",
                 "--bias", "lora_only", "--trainable-token-indices", "3,7"]) == 0  # fmt: skip
    given = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert given["modules_to_save"] == ["c_fc", "ln_f"]
    assert (given["bias"], given["trainable_token_indices"]) == ("lora_only", [3, 7])
    assert main(["inspect", str(tmp_path / "run/adapter")]) == 0
    assert "trained whole  c_fc, ln_f\n" in capsys.readouterr().out
