"""Adapters that adapt nothing, or only some targets: here each is refused by name, or adapts all."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minipeft import LoRAConfig, TrainConfig, add_adapter, load_adapter, merge_adapter, save_adapter, train
from minipeft.adapters.peft_format import CONFIG, WEIGHTS
from tests.museum.twins import peft_layers

LORA = LoRAConfig(4, 16.0, targets=("q_proj", "v_proj"))


def write_adapter(model: nn.Module, stir: Callable[[nn.Module], None], folder: Path, config: LoRAConfig = LORA) -> Path:
    """A sound adapter folder, and a model that is plain again."""
    changed = copy.deepcopy(model)
    add_adapter(changed, config)
    stir(changed)
    save_adapter(changed, folder)
    return folder


def rename(folder: Path, change: Callable[[str], str]) -> None:
    """Give each tensor of an adapter another name."""
    tensors = {change(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)


def edit(folder: Path, **changes: object) -> None:
    """Change entries of adapter_config.json."""
    given = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(given | changes))


def differs(theirs: nn.Module, folder: Path, ids: Tensor) -> bool:
    """Whether transformers' model answers otherwise with PEFT's adapter from the folder."""
    with torch.no_grad():
        base = theirs(ids).logits
        return not torch.allclose(peft.PeftModel.from_pretrained(theirs, folder).eval()(ids).logits, base)


def test_names_with_another_prefix(exhibit, twins, stir, ids, tmp_path):
    """vllm-project/vllm#34186: tensors under another module prefix load, and the base answers."""
    both = twins()
    folder = write_adapter(both.ours, stir, tmp_path / "adapter")
    rename(folder, lambda name: name.replace("base_model.model.model.", "base_model.model.transformer."))
    with exhibit.refused("no adapter tensors recognised"):
        load_adapter(both.ours, folder)
    with exhibit.theirs("peft", warning="missing adapter keys") as peer:
        peer.right = differs(both.theirs, folder, ids)


def test_targets_under_a_language_model(exhibit, twins, stir, ids, tmp_path):
    """vllm-project/vllm#48019: an adapter of the text part of a wrapper, whose modules lie under language_model, is a
    no-op on the text model."""
    both = twins()
    folder = write_adapter(both.ours, stir, tmp_path / "adapter")
    rename(folder, lambda name: name.replace("model.layers", "model.language_model.layers"))
    edit(folder, target_modules=r".*language_model.*(q|v)_proj")
    with exhibit.refused("target_modules: .*matches no linear layer"):
        load_adapter(both.ours, folder)
    with exhibit.theirs("peft", refusal="not found in the base model|No modules were targeted") as peer:
        peer.right = differs(both.theirs, folder, ids)


def test_targets_that_are_not_those_of_the_file(exhibit, twins, stir, ids, tmp_path):
    """vllm-project/vllm#55193: an adapter whose modules are none of the targets is served as the base."""
    both = twins()
    folder = write_adapter(both.ours, stir, tmp_path / "adapter")
    edit(folder, target_modules=["down_proj"])
    with exhibit.refused("no adapter tensors recognised"):
        load_adapter(both.ours, folder)
    with exhibit.theirs("peft", warning="missing adapter keys") as peer:
        peer.right = differs(both.theirs, folder, ids)


def test_a_layer_that_the_file_lacks(exhibit, twins, stir, ids, apart, tmp_path):
    """huggingface/peft#2118, huggingface/peft#1932: an adapter file that lacks tensors loads without an error."""
    both = twins()
    folder = write_adapter(both.ours, stir, tmp_path / "adapter")
    whole = load_file(folder / WEIGHTS)
    save_file({name: t for name, t in whole.items() if "layers.1." not in name}, folder / WEIGHTS)
    with exhibit.refused("missing"):
        load_adapter(both.ours, folder)
    with exhibit.theirs("peft", warning="missing adapter keys") as peer:
        model = peft.PeftModel.from_pretrained(both.theirs, folder)
        peer.right = all(module.lora_B["default"].weight.any() for module in peft_layers(model))


def test_one_name_of_several_that_matches_nothing(exhibit, twins):
    """huggingface/peft#1959, huggingface/peft#3693, huggingface/peft#3600: target names that match nothing are skipped
    if others match."""
    both = twins()
    with exhibit.refused("no linear layer is named 'FAKE_TARGET_MODULE'"):
        add_adapter(both.ours, LoRAConfig(4, targets=("q_proj", "FAKE_TARGET_MODULE")))
    with exhibit.theirs("peft", warning="FAKE_TARGET_MODULE", refusal="FAKE_TARGET_MODULE") as peer:
        given = peft.LoraConfig(target_modules=["q_proj", "FAKE_TARGET_MODULE"])
        adapted = peft.get_peft_model(both.theirs, given).targeted_module_names
        peer.right = all(any(name.endswith(target) for name in adapted) for target in given.target_modules)


def test_rank_pattern_that_matches_nothing(exhibit, twins):
    """huggingface/peft#3582: a key of rank_pattern or alpha_pattern that matches no layer has no effect."""
    both = twins()
    with exhibit.refused("alpha_pattern: .*matches no"):
        add_adapter(both.ours, LoRAConfig(4, targets=("q_proj",), alpha_pattern={"queries": 100.0}))
    with exhibit.theirs("peft", warning="queries", refusal="queries") as peer:
        given = peft.LoraConfig(r=4, target_modules=["q_proj"], alpha_pattern={"queries": 100})
        model = peft.get_peft_model(both.theirs, given)
        peer.right = any(module.scaling["default"] == 25 for module in peft_layers(model))


def test_embedding_and_head_as_targets(exhibit, twins, ids):
    """unslothai/unsloth#9326: embed_tokens and lm_head among the targets are dropped, and never trained."""
    both = twins()
    add_adapter(both.ours, LoRAConfig(4, targets=("q_proj", "embed_tokens", "lm_head")))
    both.ours.loss(ids, ids).backward()
    reached = {name.rpartition(".")[0] for name, p in both.ours.named_parameters() if p.grad is not None}
    assert {"model.embed_tokens", "lm_head"} < reached
    with exhibit.theirs("peft") as peer:
        given = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "embed_tokens", "lm_head"])
        model = peft.get_peft_model(both.theirs, given)
        model(ids, labels=ids).loss.backward()
        reached = {name for name, p in model.named_parameters() if p.grad is not None}
        peer.right = all(any(kind in name for name in reached) for kind in ("embed_tokens", "lm_head"))


def test_a_whole_head_in_an_adapter_file(exhibit, twins, stir, ids, apart, tmp_path):
    """ggml-org/llama.cpp#11554, unslothai/unsloth#3454: a head that was trained beside LoRA and lies in the adapter's
    file cannot be converted, or is dropped at the merge."""
    both = twins()
    folder = write_adapter(both.ours, stir, tmp_path / "adapter")
    head = torch.randn(both.theirs.lm_head.weight.shape, generator=torch.Generator().manual_seed(3))
    save_file(load_file(folder / WEIGHTS) | {"base_model.model.lm_head.weight": head}, folder / WEIGHTS)
    edit(folder, modules_to_save=["lm_head"])
    load_adapter(both.ours, folder)
    merge_adapter(both.ours)
    assert torch.equal(both.ours.lm_head.weight, head)
    with exhibit.theirs("peft") as peer:
        model = peft.PeftModel.from_pretrained(both.theirs, folder).merge_and_unload()
        peer.right = torch.equal(model.lm_head.weight, head)


def test_activation_checkpointing(exhibit, twins, stir, batch):
    """microsoft/LoRA#120, huggingface/transformers#42489, huggingface/transformers#26334, huggingface/trl#2486: with
    activation checkpointing no gradient reaches the adapter, as the frozen embedding's output needs none."""
    both = twins()
    add_adapter(both.ours, LORA)
    stir(both.ours)
    gradients = []
    for checkpointing in (False, True):
        both.ours.train()
        both.ours.activation_checkpointing = checkpointing
        both.ours.zero_grad()
        both.ours.loss(batch.ids, batch.labels, batch.documents).backward()
        gradients.append([p.grad.clone() for p in both.ours.parameters() if p.requires_grad])
    assert all(g.abs().max() > 0 for g in gradients[0])
    assert all(map(torch.equal, *gradients))
    with exhibit.theirs("transformers", warning="None of the inputs", failure="does not require grad") as peer:
        model = peft.get_peft_model(both.theirs, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).train()
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
        model(batch.ids, labels=batch.labels).loss.backward()
        peer.right = all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_fast_path_that_dropout_turns_off(exhibit, twins, stir, batch):
    """axolotl-ai-cloud/axolotl#3806: with dropout above 0 the fused LoRA path is skipped."""
    both = twins()
    with torch.no_grad():
        base = both.ours(batch.ids)
    plain = add_adapter(copy.deepcopy(both.ours), LORA)
    report = add_adapter(both.ours, LoRAConfig(4, 16.0, dropout=0.5, targets=("q_proj", "v_proj")))
    assert (report.modules, report.backend) == (plain.modules, plain.backend)
    stir(both.ours)
    both.ours.train()
    both.ours.loss(batch.ids, batch.labels, batch.documents).backward()
    trained = [p for p in both.ours.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(report.modules)
    assert all(p.grad.abs().max() > 0 for p in trained)
    with torch.no_grad():
        assert not torch.allclose(both.ours.eval()(batch.ids), base)


def test_all_linears_are_named(exhibit, twins):
    """unslothai/unsloth#5865, unslothai/unsloth#5820: patching reports 0 layers, and training continues."""
    both = twins()
    report = add_adapter(both.ours, LoRAConfig(4))
    linears = [name for name, module in both.theirs.named_modules() if isinstance(module, nn.Linear)]
    assert report.modules == [name for name in linears if name != "lm_head"]
    with exhibit.theirs("peft") as peer:
        model = peft.get_peft_model(both.theirs, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        peer.right = model.targeted_module_names == [name for name in linears if name != "lm_head"]


def test_a_frozen_adapter_is_not_trained(exhibit, twins, stir, batch, tmp_path):
    """huggingface/trl#6700, huggingface/trl#3926, huggingface/peft#282: an adapter that was loaded frozen is trained
    without effect."""
    both = twins()
    folder = write_adapter(both.ours, stir, tmp_path / "adapter")
    load_adapter(both.ours, folder)
    with exhibit.refused("nothing is trainable"):
        train(both.ours, [batch], TrainConfig(steps=1))
    with exhibit.theirs("peft", failure="does not require grad") as peer:
        model = peft.PeftModel.from_pretrained(both.theirs, folder).train()
        model(batch.ids, labels=batch.labels).loss.backward()
        peer.right = any(p.grad is not None for p in model.parameters())
