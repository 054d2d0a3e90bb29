"""`minipeft compare`: the first tensor in which two models part, against a known cause and against transformers."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from minipeft.cli import main
from minipeft.errors import InputError
from minipeft.runs.comparison import CompareConfig, compare, measure
from tests.small import write_adapter, write_small_model

IDS = (5, 66, 7, 80, 9, 101, 17, 3)
CHANGED = {"gpt2": "transformer.h.1.mlp.c_fc", "llama": "model.layers.1.mlp.up_proj"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Of each family: a folder, and a copy with one weight of the second block changed in one entry."""
    found = {}
    for family, module in CHANGED.items():
        folder = tmp_path_factory.mktemp(family)
        write_small_model(folder / "model", family)
        shutil.copytree(folder / "model", folder / "changed")
        file = folder / "changed" / "model.safetensors"
        tensors = load_file(file)
        tensors[f"{module}.weight"][3, 2] += 0.5
        save_file(tensors, file, metadata={"format": "pt"})
        write_adapter(folder / "model", folder / "adapter")
        found[family] = folder
    return found


@pytest.mark.parametrize("family", CHANGED)
def test_the_changed_weight_and_the_first_output_after_it_are_named(models, family):
    folder, module = models[family], CHANGED[family]
    found = compare(CompareConfig(str(folder / "model"), str(folder / "changed"), ids=IDS))
    assert not found.equal
    assert found.first("weight").name == f"{module}.weight"
    assert found.first("weight").absolute == pytest.approx(0.5)
    assert found.first("forward").name == module
    forward = [row for row in found.rows if row.stage == "forward"]
    before = forward[: forward.index(found.first("forward"))]
    assert len(before) > 10
    assert all(row.absolute == 0 for row in before)
    assert [row.name for row in forward][-1] == "logits"
    assert next(row.name for row in found.rows if row.stage == "backward") == "logits"


@pytest.mark.parametrize("family", CHANGED)
def test_a_model_equals_itself(models, family):
    model = str(models[family] / "model")
    found = compare(CompareConfig(model, model, ids=IDS))
    assert found.equal
    assert {row.absolute for row in found.rows} == {0.0}
    assert found.only_first == found.only_second == ()


@pytest.mark.parametrize("family", CHANGED)
def test_transformers_computes_the_same_and_a_changed_weight_is_found_there_too(models, family):
    model, changed = str(models[family] / "model"), str(models[family] / "changed")
    found = compare(CompareConfig(model, model, ids=IDS, transformers=True))
    assert found.equal
    stages = [row.stage for row in found.rows]
    assert min(stages.count("weight"), stages.count("forward"), stages.count("backward")) > 12
    assert "model.layers.1.self_attn" in [r.name for r in found.rows] or "transformer.h.1.attn" in [
        r.name for r in found.rows
    ]
    parted = compare(CompareConfig(model, changed, ids=IDS, transformers=True))
    assert parted.first("weight").name == f"{CHANGED[family]}.weight"
    assert parted.first("forward").name == CHANGED[family]


def test_two_dtypes_part_at_a_tolerance_of_float32_and_not_at_bfloat16s(models):
    model = str(models["llama"] / "model")
    assert compare(CompareConfig(model, model, ids=IDS, dtype_b="bf16")).equal
    found = compare(CompareConfig(model, model, ids=IDS, dtype_b="bf16", tolerance=1e-5))
    assert found.first("forward").name == "model.embed_tokens"  # no random weight is exact in bfloat16
    assert 0 < found.first("forward").relative < 0.02


def test_an_adapter_counts_and_a_backend_that_cannot_run_is_refused(models):
    folder = models["gpt2"]
    model, adapter = str(folder / "model"), str(folder / "adapter")
    found = compare(CompareConfig(model, model, adapter=adapter, ids=IDS, backend="reference"))
    assert found.equal
    assert any("lora_A" in row.name for row in found.rows)
    shutil.copytree(folder / "adapter", folder / "other")
    tensors = load_file(folder / "other" / "adapter_model.safetensors")
    name = next(name for name in tensors if ".h.1.attn.c_attn.lora_B" in name)
    tensors[name] *= 2
    save_file(tensors, folder / "other" / "adapter_model.safetensors", metadata={"format": "pt"})
    parted = compare(CompareConfig(model, model, adapter=adapter, adapter_b=str(folder / "other"), ids=IDS))
    assert parted.first("weight").name == "transformer.h.1.attn.c_attn.lora_B"
    assert parted.first("forward").name == "transformer.h.1.attn.c_attn"
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="backend='hybrid' cannot run here"):
            compare(CompareConfig(model, model, adapter=adapter, ids=IDS, backend_b="hybrid"))


def test_shapes_and_values_that_cannot_be_subtracted_are_differences():
    one = measure("forward", "x", torch.zeros(2, 3), torch.zeros(2, 4))
    assert (one.problem, one.exceeds(1e9)) == ("shapes [2, 3] and [2, 4]", True)
    two = measure("forward", "x", torch.zeros(2), torch.tensor([0.0, float("nan")]))
    assert (two.problem, two.exceeds(1e9)) == ("not finite", True)


def test_the_command_names_the_tensor(models, capsys):
    folder = models["gpt2"]
    words = ["compare", str(folder / "model"), str(folder / "changed"), "--ids", "5,66,7,80"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "first difference, weight: transformer.h.1.mlp.c_fc.weight, by 0.5" in said
    assert "first difference, forward: transformer.h.1.mlp.c_fc, by" in said
    assert "<-" in said
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["first"]["forward"]["name"] == CHANGED["gpt2"]
    assert found["equal"] is False


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"transformers": True, "adapter": "a"}, "transformers: it cannot load an adapter or a backend. Merge the"),
        ({"backend": "hybrid"}, "backend: chooses how LoRA is computed, but the model has none"),
        ({"ids": (5,)}, "ids: needs at least two ids"),
        ({"ids": (5, 400)}, "400"),
    ],
)
def test_what_cannot_be_compared_is_refused(models, given, said):
    model = str(models["gpt2"] / "model")
    with pytest.raises(InputError) as caught:
        compare(CompareConfig(model, model, **{"ids": IDS, **given}))
    assert said in str(caught.value)


def test_without_transformers_the_command_says_so(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    model = str(models["gpt2"] / "model")
    with pytest.raises(InputError, match=r"transformers: is not installed\. pip install transformers"):
        compare(CompareConfig(model, model, ids=IDS, transformers=True))
    with pytest.raises(InputError, match="no such folder"):
        compare(CompareConfig(model, "nowhere", ids=IDS, transformers=True))
