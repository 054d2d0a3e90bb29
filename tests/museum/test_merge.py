"""Save, load and merge: loading restores the trained tensors, and a merge reports its error."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minipeft import (
    LoRAConfig,
    add_adapter,
    load_adapter,
    load_model,
    merge_adapter,
    remove_adapter,
    save_adapter,
    save_model,
)
from minipeft.adapters.lora import find_lora_layers
from minipeft.adapters.peft_format import CONFIG, WEIGHTS
from tests.museum.twins import peft_layers


def lost_share(before: Tensor, update: Tensor, after: Tensor) -> float:
    """|after - before - update| / |update|: the share of an update that rounding took away."""
    return float((after.double() - before.double() - update.double()).norm() / update.double().norm())


def test_what_rounding_takes_away(exhibit, twins, stir):
    """unslothai/unsloth#3091, huggingface/peft#1035: an adapter that is merged into bfloat16 weights loses a part of
    its update, and nothing says how much."""
    both = twins(dtype=torch.bfloat16)
    add_adapter(both.ours, LoRAConfig(4, 0.05, targets=("layers.0.self_attn.q_proj",)))
    stir(both.ours)
    (layer,) = find_lora_layers(both.ours).values()
    before, update = layer.weight.detach().clone(), (layer.merged()[0] - layer.weight).detach()
    report = merge_adapter(both.ours)
    lost = lost_share(before, update, both.ours.model.layers[0].self_attn.q_proj.weight.detach())
    assert report.relative_error == pytest.approx(lost, rel=1e-3)
    assert lost > 0.3
    with exhibit.theirs("peft", warning="round|precision") as peer, torch.no_grad():
        given = peft.LoraConfig(r=4, lora_alpha=0.05, target_modules=["layers.0.self_attn.q_proj"])
        model = peft.get_peft_model(both.reload(), given)
        stir(model)
        (layer,) = peft_layers(model)
        before, update = layer.base_layer.weight.clone(), layer.get_delta_weight("default").float()
        merged = model.merge_and_unload()
        peer.right = lost_share(before, update, merged.model.layers[0].self_attn.q_proj.weight) < 0.1


def test_a_merge_that_overflows(exhibit, twins, stir):
    """huggingface/peft#1001, huggingface/diffusers#5316: a merged float16 weight overflows to inf, and the model is
    written."""
    both = twins(dtype=torch.float16)
    add_adapter(both.ours, LoRAConfig(4, 3e6, targets=("q_proj",)))
    stir(both.ours)
    before = {name: p.clone() for name, p in both.ours.state_dict().items()}
    with exhibit.refused("cannot merge into 'model.layers.0.self_attn.q_proj': the merged weight would not be finite"):
        merge_adapter(both.ours)
    assert all(torch.equal(p, before[name]) for name, p in both.ours.state_dict().items())
    with exhibit.theirs("peft", refusal="NaN|finite") as peer:
        model = peft.get_peft_model(both.reload(), peft.LoraConfig(r=4, lora_alpha=3e6, target_modules=["q_proj"]))
        stir(model)
        peer.right = bool(model.merge_and_unload().model.layers[0].self_attn.q_proj.weight.isfinite().all())


def test_a_tied_head(exhibit, twins, stir, tmp_path):
    """huggingface/peft#2018, huggingface/transformers#45127, hiyouga/LlamaFactory#8859: an adapter on the head of a
    tied model changes the embedding too when it is merged, or is lost when the model is saved."""
    both = twins(tie_word_embeddings=True)
    ids = torch.arange(20)[None]
    add_adapter(both.ours, LoRAConfig(4, targets=("lm_head",)))
    stir(both.ours)
    with torch.no_grad():
        table, tuned = both.ours.embedding.weight.clone(), both.ours(ids)
        merge_adapter(both.ours)
        assert torch.equal(both.ours.embedding.weight, table)
        assert (both.ours(ids) - tuned).abs().max() <= 1e-5 * tuned.abs().max()
    save_model(both.ours, tmp_path / "ours")
    assert torch.equal(load_model(tmp_path / "ours").lm_head.weight, both.ours.lm_head.weight)
    with exhibit.theirs("peft", warning="tie_word_embeddings|tied") as peer:
        model = peft.get_peft_model(both.theirs, peft.LoraConfig(r=4, target_modules=["lm_head"]))
        before = both.theirs.model.embed_tokens.weight.clone()
        stir(model)
        peer.right = torch.equal(model.merge_and_unload().model.embed_tokens.weight, before)


def test_pissa_leaves_the_base_alone(exhibit, twins, stir, ids, apart, tmp_path):
    """huggingface/peft#2184, huggingface/transformers#34468, huggingface/peft#1929: loading a PiSSA adapter changes the
    base, so that without it, or with another, the model's answers change."""
    both = twins()
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    with torch.no_grad():
        base = both.ours(ids)
    add_adapter(both.ours, LoRAConfig(4, targets=("q_proj",), init="pissa"))
    stir(both.ours)
    with torch.no_grad():
        trained = both.ours(ids)
        save_adapter(both.ours, tmp_path / "ours")
        remove_adapter(both.ours)
        assert torch.equal(both.ours(ids), base)
        load_adapter(both.ours, tmp_path / "ours")
        assert apart(both.ours(ids), trained) < 1e-5
        remove_adapter(both.ours)
        assert torch.equal(both.ours(ids), base)
    with exhibit.theirs("peft", warning="PiSSA|pissa|base") as peer, torch.no_grad():
        model = peft.get_peft_model(both.reload(), config)
        stir(model)
        model.save_pretrained(tmp_path / "theirs")
        again = peft.PeftModel.from_pretrained(both.reload(), tmp_path / "theirs").eval()
        with again.disable_adapter():
            peer.right = apart(again(ids).logits, base) < 1e-3


def test_merged_is_unmerged(exhibit, twins, stir, ids, apart):
    """Lightning-AI/litgpt#1224, Lightning-AI/litgpt#960, Lightning-AI/litgpt#629, tloen/alpaca-lora#19: a merged model
    is not the adapted one: a transposed weight, an unknown scale, or no merge at all."""
    both = twins("gpt2")
    targets = ("c_attn", "attn.c_proj", "c_fc")
    given = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_rslora=True)
    with torch.no_grad():
        for config in (LoRAConfig(4, 12.0, targets=targets), LoRAConfig(4, 12.0, targets=("c_attn",), dora=True)):
            add_adapter(both.ours, config)
            stir(both.ours)
            wanted, before = both.ours(ids), both.ours.get_parameter("transformer.h.0.attn.c_attn.weight").clone()
            merge_adapter(both.ours)
            assert apart(both.ours(ids), wanted) < 1e-5
            assert not torch.equal(both.ours.get_parameter("transformer.h.0.attn.c_attn.weight"), before)
    with exhibit.theirs("peft") as peer, torch.no_grad():
        model = peft.get_peft_model(both.reload(), given)
        stir(model)
        wanted = model.eval()(ids).logits
        peer.right = apart(model.merge_and_unload()(ids).logits, wanted) < 1e-5


def test_a_saved_model_holds_the_adapter(exhibit, twins, stir, ids, tmp_path):
    """unslothai/unsloth#611: the model that is saved as merged is the base."""
    both = twins()
    add_adapter(both.ours, LoRAConfig(4))
    stir(both.ours)
    with exhibit.refused("the model holds an adapter .* merge_adapter or remove_adapter first"):
        save_model(both.ours, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merge_adapter(both.ours)
    save_model(both.ours, tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "merged")(ids), both.ours(ids))


def test_a_quantized_base(exhibit, twins):
    """artidoro/qlora#28, bitsandbytes-foundation/bitsandbytes#430, huggingface/peft#2321: merging into a 4-bit base
    fails, or changes the answers by rounding."""
    model = load_model(twins().folder, quantize="nf4")
    add_adapter(model, LoRAConfig(rank=2))
    with exhibit.refused(r"quantized again, with another error"):
        merge_adapter(model)


def test_an_adapter_of_another_vocabulary(exhibit, twins, tmp_path):
    """unslothai/unsloth#1343, huggingface/peft#436: an adapter that was trained with added tokens is loaded on the base
    without them."""
    both = twins()
    model = peft.get_peft_model(twins(vocab_size=300).theirs, peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    model.save_pretrained(tmp_path / "adapter")
    with exhibit.refused("embed_tokens"):
        load_adapter(both.ours, tmp_path / "adapter")
    with exhibit.theirs("peft", refusal="size mismatch") as peer:
        peft.PeftModel.from_pretrained(both.theirs, tmp_path / "adapter")
        peer.right = both.theirs.config.vocab_size == 300


def test_saving_and_loading_is_the_identity(exhibit, twins, stir, ids, tmp_path):
    """OpenGVLab/InternVL#615: an adapter that was trained, saved and loaded again has no effect."""
    both = twins()
    for config in (
        LoRAConfig(3, 5.0, rslora=True),
        LoRAConfig(3, dora=True),
        LoRAConfig(3, rank_pattern={"q_proj": 5}),
    ):
        model = copy.deepcopy(both.ours)
        add_adapter(model, config)
        stir(model)
        save_adapter(model, tmp_path / "adapter")
        again = copy.deepcopy(both.ours)
        load_adapter(again, tmp_path / "adapter")
        with torch.no_grad():
            assert torch.equal(again(ids), model(ids))
    with exhibit.theirs("peft") as peer, torch.no_grad():
        given = peft.LoraConfig(r=3, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(both.theirs, given).eval()
        stir(model)
        wanted = model(ids).logits
        model.save_pretrained(tmp_path / "theirs")
        loaded = peft.PeftModel.from_pretrained(both.reload(), tmp_path / "theirs").eval()
        peer.right = torch.allclose(loaded(ids).logits, wanted, atol=1e-5)


def test_a_name_in_the_tensors(exhibit, twins, stir, ids, tmp_path):
    """huggingface/peft#2699, huggingface/accelerate#3704: an adapter that was saved under a name of its own loads as an
    untrained one."""
    both = twins()
    add_adapter(both.ours, LoRAConfig(4, targets=("q_proj",)))
    stir(both.ours)
    save_adapter(both.ours, tmp_path / "adapter")
    file = tmp_path / "adapter" / WEIGHTS
    save_file({name.replace(".weight", ".mine.weight"): t for name, t in load_file(file).items()}, file)
    assert (tmp_path / "adapter" / CONFIG).exists()
    with exhibit.refused("no adapter tensors recognised; the first is .*lora_A.mine.weight"):
        load_adapter(load_model(both.folder), tmp_path / "adapter")
    with exhibit.theirs("peft", warning="missing adapter keys") as peer, torch.no_grad():
        base = both.theirs(ids).logits
        model = peft.PeftModel.from_pretrained(both.theirs, tmp_path / "adapter").eval()
        peer.right = not torch.equal(model(ids).logits, base)


def test_weights_that_a_checkpoint_lacks(exhibit, twins):
    """JIA-Lab-research/LISA#177: tensors that a checkpoint lacks are drawn at random, after a warning."""
    both = twins()
    file = both.folder / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "layers.1.mlp.up_proj" not in k}, file, {"format": "pt"})
    with exhibit.refused("model.layers.1.mlp.up_proj.weight"):
        load_model(both.folder)
    with exhibit.theirs("transformers", warning="MISSING|newly initialized", refusal="up_proj") as peer:
        weight = both.reload().model.layers[1].mlp.up_proj.weight
        peer.right = torch.equal(weight, both.theirs.model.layers[1].mlp.up_proj.weight)
