"""inspect reads the files alone, and reports what loading would count."""

import json

import pytest
import torch

from minipeft.adapters import IA3Config, LoRAConfig, PrefixConfig, add_adapter
from minipeft.adapters.inspection import as_table, describe
from minipeft.adapters.peft_format import save_adapter
from minipeft.errors import InputError
from minipeft.models.checkpoint import save_model


def saved(model, config, folder):
    report = add_adapter(model, config)
    model.source = "some/base"
    save_adapter(model, folder)
    return report, describe(folder)


def test_lora(model, tmp_path):
    config = LoRAConfig(3, 6.0, dropout=0.1, rslora=True, layers=(0, 2), rank_pattern={"c_proj|o_proj": 5})
    report, told = saved(model, config, tmp_path / "out")
    assert (told["kind"], told["method"], told["base"]) == ("adapter", "lora", "some/base")
    assert (told["rank"], told["alpha"], told["dropout"]) == ([3, 5], 6, 0.1)
    assert (told["layers"], told["variants"], told["modules"]) == ([0, 2], ["rsLoRA"], len(report.modules))
    assert (told["parameters"], told["dtype"]) == (report.trainable, "F32")
    assert told["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    json.dumps(told)
    assert "rank        3, 5\n" in as_table(told)
    assert f"parameters  {report.trainable:,}\n" in as_table(told)


def test_ia3_and_prefix(decoder, tmp_path):
    report, told = saved(decoder("llama"), IA3Config(), tmp_path / "ia3")
    assert (told["method"], told["feedforward"], told["parameters"]) == ("ia3", ["down_proj"], report.trainable)
    report, told = saved(decoder("llama"), PrefixConfig(4, init="peft"), tmp_path / "prefix")
    assert (told["method"], told["virtual tokens"], told["parameters"]) == ("prefix", 4, report.trainable)
    assert "training state" not in as_table(told)


def test_a_model(model, family, tmp_path):
    save_model(model.to(torch.bfloat16), tmp_path / "model")
    told = describe(tmp_path / "model")
    count = sum(p.numel() for p in model.parameters())
    assert (told["kind"], told["family"], told["layers"], told["dtype"]) == ("model", family, 3, "BF16")
    assert told["parameters"] == count
    assert "vocabulary" in as_table(told)


def test_a_foreign_adapter_is_told_and_named(decoder, tmp_path):
    saved(decoder("llama"), LoRAConfig(2), tmp_path / "out")
    file = tmp_path / "out" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": "LOHA"}))
    assert describe(tmp_path / "out")["method"] == "LOHA (not supported here)"


def test_other_folders(decoder, tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        describe(tmp_path / "nowhere")
    (tmp_path / "note").write_text("")
    with pytest.raises(InputError, match="note: is a file; the folder that holds it is wanted"):
        describe(tmp_path / "note")
    (tmp_path / "note").unlink()
    (tmp_path / "adapter").mkdir()
    with pytest.raises(InputError, match=r"holds neither adapter_config.json nor config.json \(it holds: adapter\)"):
        describe(tmp_path)
    with pytest.raises(InputError, match=r"Look into .*adapter"):
        describe(tmp_path)
    saved(decoder("llama"), LoRAConfig(2), tmp_path / "adapter")
    data = tmp_path / "adapter" / "adapter_model.safetensors"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(InputError, match="data incomplete"):
        describe(tmp_path / "adapter")
