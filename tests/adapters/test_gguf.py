"""A LoRA file of ours as llama.cpp reads it: the names, shapes and numbers that its convert_lora_to_gguf.py takes.

The script is no part of the `gguf` package, so it is not run here. What it does with a file is repeated in
tests/clients.py, with the package's own table of names.
"""

from pathlib import Path

import pytest
import torch

import minipeft
from minipeft.adapters import LoRAConfig, add_adapter
from minipeft.adapters.lora import find_lora_layers
from minipeft.models import FAMILIES
from tests import clients
from tests.clients import Refused

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed (README, The tests)")

ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "smollm3": "SMOLLM3",
                 "granite": "GRANITE", "olmo2": "OLMO2", "olmo3": "OLMO2", "gemma": "GEMMA", "gemma2": "GEMMA2",
                 "gemma3_text": "GEMMA3", "starcoder2": "STARCODER2", "phi3": "PHI3", "phi": "PHI2",
                 "gpt_neox": "GPTNEOX", "gpt2": "GPT2"}  # fmt: skip
SHAPE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 96, "pad_token_id": None}  # fmt: skip
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}


def convert(folder: Path, architecture: str) -> tuple[float, dict[str, torch.Tensor]]:
    """tests/clients.py's, with the number of layers here."""
    return clients.convert(folder, architecture, SHAPE["num_hidden_layers"])


def saved(folder: Path, family: str = "llama", **settings: object) -> torch.nn.Module:
    """A random LoRA on a random model, saved."""
    model = FAMILIES[family].decoder(FAMILIES[family].config(**(GPT2 if family == "gpt2" else SHAPE)))
    add_adapter(model, LoRAConfig(**{"rank": 3, "alpha": 7.0} | settings))
    draw = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(0, 1, generator=draw)
    minipeft.save_adapter(model, folder)
    return model


@pytest.mark.parametrize("family", [family for family in ARCHITECTURES if family != "gpt2"])
def test_every_linear_has_a_name_there_and_the_same_update(family, tmp_path):
    model = saved(tmp_path, family)
    alpha, tensors = convert(tmp_path, ARCHITECTURES[family])
    layers = find_lora_layers(model)
    assert len(tensors) == 2 * len(layers)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[family]], SHAPE["num_hidden_layers"])
    for path, layer in layers.items():
        name = names.get_name(f"{path}.weight", try_suffixes=(".weight",))
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        assert A.shape[-2] == B.shape[-1]  # which the script asserts
        assert (B.shape[0], A.shape[1]) == layer.weight.shape
        assert torch.equal(alpha / A.shape[0] * (B @ A), layer.scale * (layer.lora_B @ layer.lora_A))


def test_the_numbers_come_back_from_a_gguf_file(tmp_path):
    saved(tmp_path)
    alpha, tensors = convert(tmp_path, "LLAMA")
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    read = gguf.GGUFReader(tmp_path / "lora.gguf")
    assert read.get_field(gguf.Keys.Adapter.LORA_ALPHA).contents() == 7.0
    assert {t.name for t in read.tensors} == set(tensors)
    for t in read.tensors:
        assert torch.equal(torch.from_numpy(t.data.copy()), tensors[t.name])


def test_pissa_and_ranks_by_pattern_go_through(tmp_path):
    for number, settings in enumerate(({"init": "pissa"}, {"rank_pattern": {"q_proj": 5}})):
        model = saved(tmp_path / str(number), **settings)
        alpha, tensors = convert(tmp_path / str(number), "LLAMA")
        layer = model.get_submodule("model.layers.1.self_attn.q_proj")
        A, B = tensors["blk.1.attn_q.weight.lora_a"], tensors["blk.1.attn_q.weight.lora_b"]
        _, _, ours_A, ours_B, scale = layer.part()
        assert torch.allclose(alpha / A.shape[0] * (B @ A), scale * (ours_B @ ours_A), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"dora": True}, {"lora_bias": True}], ids=["dora", "lora_bias"])
def test_what_llama_cpp_does_not_have_is_refused_there(settings, tmp_path):
    saved(tmp_path, **settings)
    with pytest.raises(Refused):
        convert(tmp_path, "LLAMA")


@pytest.mark.parametrize("settings", [{"rslora": True}, {"alpha_pattern": {"q_proj": 1.0}}], ids=["rslora", "alphas"])
def test_what_llama_cpp_scales_wrongly(settings, tmp_path):
    """docs/peft-names.md warns of both: the script reads neither key, so that the update has another scale there."""
    model = saved(tmp_path, **settings)
    alpha, tensors = convert(tmp_path, "LLAMA")
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert alpha / tensors["blk.0.attn_q.weight.lora_a"].shape[0] != pytest.approx(layer.scale, rel=0.1)


@pytest.mark.parametrize(
    "settings",
    [
        {"rslora": True},
        {"alpha_pattern": {"q_proj": 1.0}, "rank_pattern": {"q_proj|up_proj": 5}},
        {"init": "olora", "rslora": True, "alpha_pattern": {"0.self_attn.v_proj": 2.5}},
    ],
    ids=["rslora", "patterns", "olora"],
)
def test_baked_scales_are_right_there_and_here(settings, tmp_path):
    """save_adapter(baked=True): the script's scale, lora_alpha over the rank of the tensors, is then the right one."""
    model = saved(tmp_path, **settings)
    minipeft.save_adapter(model, tmp_path / "baked", baked=True)
    alpha, tensors = convert(tmp_path / "baked", "LLAMA")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SHAPE["num_hidden_layers"])
    wanted = {}
    for path, layer in find_lora_layers(model).items():
        name = names.get_name(f"{path}.weight", try_suffixes=(".weight",))
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        _, _, ours_A, ours_B, scale = layer.part()
        wanted[path] = scale * (ours_B @ ours_A)
        torch.testing.assert_close(alpha / A.shape[0] * (B @ A), wanted[path], rtol=1e-4, atol=1e-6)
    minipeft.remove_adapter(model)
    minipeft.load_adapter(model, tmp_path / "baked")
    for path, layer in find_lora_layers(model).items():
        torch.testing.assert_close(layer.scale * (layer.lora_B @ layer.lora_A), wanted[path], rtol=1e-4, atol=1e-6)


def test_what_cannot_be_baked_is_refused(tmp_path):
    model = saved(tmp_path, dora=True)
    with pytest.raises(
        minipeft.InputError, match="baked: DoRA and lora_bias cannot be baked: their update is not B A alone"
    ):
        minipeft.save_adapter(model, tmp_path / "baked", baked=True)
    minipeft.remove_adapter(model)
    minipeft.add_adapter(model, minipeft.IA3Config())
    with pytest.raises(minipeft.InputError, match="baked: the model holds ia3, which has no scale"):
        minipeft.save_adapter(model, tmp_path / "baked", baked=True)
    assert not (tmp_path / "baked").exists()


def test_gpt2_is_transposed_there(tmp_path):
    """The script transposes GPT-2's weights, which Hugging Face stores as [in, out]; A and B are not stored so."""
    model = saved(tmp_path, "gpt2", targets=("c_fc",))
    _, tensors = convert(tmp_path, "GPT2")
    A, B = tensors["blk.0.ffn_up.weight.lora_a"], tensors["blk.0.ffn_up.weight.lora_b"]
    assert (B @ A).T.shape != model.get_submodule("transformer.h.0.mlp.c_fc").weight.shape
