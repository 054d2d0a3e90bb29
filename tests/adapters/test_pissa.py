"""PiSSA's init against the singular values of the weight, and its error in bfloat16 against PEFT's."""

import copy

import peft
import pytest
import torch
import transformers

from minipeft.adapters import LoRAConfig, add_adapter
from minipeft.adapters.lora import find_lora_layers
from minipeft.errors import InputError
from minipeft.models.checkpoint import save_model


class TestPissa:
    def test_it_starts_from_the_largest_singular_values(self, decoder):
        model = decoder("llama")
        add_adapter(model, LoRAConfig(rank=4, alpha=8.0, init="pissa"))
        for layer in find_lora_layers(model).values():
            update = layer.scale * layer.lora_B.double() @ layer.lora_A.double()
            values = torch.linalg.svdvals(layer.weight.double())
            rest = torch.linalg.matrix_norm(layer.weight - update, 2)
            torch.testing.assert_close(rest, values[4], rtol=1e-5, atol=0)
            torch.testing.assert_close(torch.linalg.svdvals(update)[:4], values[:4], rtol=1e-5, atol=1e-5)

    def test_a_rank_beyond_the_singular_values_is_refused_before_anything_changes(self, decoder):
        model = decoder("llama")
        shown = repr(model)
        with pytest.raises(
            InputError, match=r"rank: 17 exceeds the 16 singular values of 'model\.layers\.0\.self_attn"
        ):
            add_adapter(model, LoRAConfig(rank=17, init="pissa"))
        assert repr(model) == shown


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("moved", [0.0, 0.02, 0.3], ids=["at first", "little", "much"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_error_in_bfloat16_is_no_larger_than_pefts(decoder, family, moved, tmp_path):
    """Of the logits against float64, at the init and after A and B moved by a share of their spread. PEFT rounds the
    residual W - s B0 A0 to bfloat16; here the pair is formed so that its rounding is that of the update."""
    torch.manual_seed(0)
    ids = torch.randint(0, 61, (8, 40))
    model = decoder(family).to(torch.bfloat16)
    save_model(model, tmp_path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    targets = ["c_attn", "c_proj", "c_fc"] if family == "gpt2" else "all-linear"
    given = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": targets}
    theirs = peft.get_peft_model(peer, peft.LoraConfig(**given, init_lora_weights="pissa")).eval()
    exact = {"ours": copy.deepcopy(model).double(), "theirs": copy.deepcopy(model).double()}
    add_adapter(model, LoRAConfig(8, 16.0, init="pissa"))
    modules = dict(theirs.named_modules())
    with torch.no_grad():
        for path, layer in find_lora_layers(model).items():
            twin = modules[f"base_model.model.{path}"]
            pairs = {"ours": (layer.lora_B, layer.lora_A)}
            pairs["theirs"] = tuple(getattr(twin, f"lora_{letter}")["default"].weight for letter in "BA")
            noise = [torch.randn(p.shape) * moved * p.std() for p in pairs["ours"]]
            for name, (B, A) in pairs.items():
                before = B.double() @ A.double()
                for p, change in zip((B, A), noise):
                    p.add_(change)
                exact[name].get_submodule(path).weight.add_(layer.scale * (B.double() @ A.double() - before))
        error = lambda name, logits: (logits.double() - exact[name](ids)).square().mean().sqrt()
        assert error("ours", model(ids)) <= error("theirs", theirs(ids).logits)
