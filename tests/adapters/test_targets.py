"""Targets: each way to name linears, and the errors for no match."""

import re

import pytest

from minipeft.adapters import IA3Config, LoRAConfig, VeRAConfig, add_adapter, remove_adapter
from minipeft.adapters.lora import find_lora_layers
from minipeft.adapters.targets import list_linears, parse_targets
from minipeft.errors import InputError

MATCHLESS = {
    "no such name": ({"targets": ["q_proj", "qproj"]}, "targets: no linear layer is named 'qproj'; this model has"),
    "half a name": ({"targets": ["proj"]}, "no linear layer is named 'proj'"),
    "no match": ({"targets": r"h\.\d+"}, "matches no linear layer, such as 'model.layers.0"),
    "plain name as text": ({"targets": "q_proj"}, "give plain names as a list"),
    "invalid": ({"targets": "(q_proj"}, "'(q_proj' is not a regular expression: missing )"),
    "no such layer": ({"layers": [1, 3]}, "layers: no layer 3: this model has 0 to 2"),
    "layers of a pattern": ({"targets": ".*q_proj", "layers": [1]}, "layers: cannot be combined"),
    "rank pattern": ({"rank_pattern": {"k_proj": 2, "kproj": 3}}, "rank_pattern: 'kproj' matches none"),
    "outside": ({"targets": ["q_proj"], "alpha_pattern": {"k_proj": 2}}, "alpha_pattern: 'k_proj' matches none"),
}  # fmt: skip


class TestTargets:
    GPT2 = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")

    def paths(self, model, **given):
        add_adapter(model, LoRAConfig(rank=2, **given))
        found = list(find_lora_layers(model))
        remove_adapter(model)
        return found

    def test_each_way_to_name_them(self, decoder):
        model = decoder("gpt2")
        of = lambda *ends, layers=(0, 1, 2): [f"transformer.h.{i}.{end}" for i in layers for end in ends]
        assert self.paths(model) == of(*self.GPT2) == list_linears(model)
        assert self.paths(model, targets="default") == of("attn.c_attn")
        assert self.paths(model, targets=["c_proj"]) == of("attn.c_proj", "mlp.c_proj")
        assert self.paths(model, targets=["mlp.c_proj", "c_fc"]) == of("mlp.c_fc", "mlp.c_proj")
        assert self.paths(model, targets=["transformer.h.1.mlp.c_fc"]) == of("mlp.c_fc", layers=(1,))
        assert self.paths(model, layers=[2, 0]) == of(*self.GPT2, layers=(0, 2))
        assert self.paths(model, targets=r".*\.[02]\.(attn|mlp)\.c_(attn|fc)") == of(
            "attn.c_attn", "mlp.c_fc", layers=(0, 2)
        )
        llama = decoder("llama")
        assert len(self.paths(llama)) == 21
        assert {path.rsplit(".", 1)[1] for path in self.paths(llama, targets="default")} == {"q_proj", "v_proj"}

    @pytest.mark.parametrize(("given", "said"), MATCHLESS.values(), ids=list(MATCHLESS))
    def test_what_matches_nothing_is_an_error_and_touches_nothing(self, decoder, given, said):
        model = decoder("llama")
        shown = repr(model)
        with pytest.raises(InputError, match=re.escape(said)):
            add_adapter(model, LoRAConfig(rank=2, **given))
        assert repr(model) == shown
        assert model.adapter is None


TABLES = {
    "embedding": (["embed_tokens"], "is an embedding: a table that is looked up"),
    "embedding by pattern": (r".*(embed_tokens|q_proj)", "is an embedding"),
    "head": (["lm_head"], "'lm_head' is not a linear layer of the blocks: LoRA alone adapts the head"),
    "everything": (".*", "'model.embed_tokens' is an embedding"),
}


@pytest.mark.parametrize(("targets", "said"), TABLES.values(), ids=list(TABLES))
def test_lora_alone_adapts_embedding_and_head(decoder, targets, said):
    model = decoder("llama")
    for config in (VeRAConfig(2, targets=targets), IA3Config(targets=targets)):
        with pytest.raises(InputError, match=re.escape(said)):
            add_adapter(model, config)
    wanted = [name for name, m in model.named_modules() if hasattr(m, "weight") and re.search("embed|head|proj", name)]
    if targets == ".*":
        assert add_adapter(model, LoRAConfig(2, targets=targets)).modules == wanted
    else:
        assert {*add_adapter(model, LoRAConfig(2, targets=targets)).modules} & {"model.embed_tokens", "lm_head"}


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("all-linear", "all-linear"),
        ("default", "default"),
        ("q_proj", ("q_proj",)),
        ("q_proj,attn.c_proj,", ("q_proj", "attn.c_proj")),
        ("transformer.h.0.attn.c_attn", ("transformer.h.0.attn.c_attn",)),
        (r".*\.[02]\.attn\.c_(attn|proj)", r".*\.[02]\.attn\.c_(attn|proj)"),
        (r".*layers\.\d{1,2}\.mlp.*", r".*layers\.\d{1,2}\.mlp.*"),
    ],
)
def test_the_command_lines_text_is_a_name_a_list_or_a_pattern(text, targets):
    assert parse_targets(text) == targets
    LoRAConfig(targets=parse_targets(text))


@pytest.mark.parametrize("text", ["", ",", ",,"])
def test_no_target_is_refused(text):
    with pytest.raises(InputError, match=r"targets: '.*' names no linear layer"):
        parse_targets(text)
