"""The prompts of a merge's comparison, and the files of a folder that are pushed."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers

from minipeft import load_model, load_pairs
from minipeft.data.templates import format_prompt
from minipeft.errors import InputError
from minipeft.runs.config import ModelConfig
from minipeft.runs.publishing import MergeConfig, list_own_files, read_prompts
from tests.small import write_adapter, write_small_model

WHAT = (ModelConfig("demo"), Path("adapter"), Path("out"))  # of a MergeConfig


def test_prompts_are_lines_or_questions(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n \ntwo\nthree\n")
    file = str(tmp_path / "p.txt")
    assert read_prompts(MergeConfig(*WHAT, prompts=file, raw=True, limit=2)) == ["one", "two"]
    assert read_prompts(MergeConfig(*WHAT, prompts=file)) == [format_prompt(line) for line in ("one", "two", "three")]
    asked = [format_prompt(pair.intent) for pair in load_pairs("demo", split="test").items[:3]]
    assert read_prompts(MergeConfig(*WHAT, data="demo", limit=3)) == asked
    (tmp_path / "p.txt").write_text("\n\n")
    with pytest.raises(InputError, match=r"p\.txt: holds no prompts"):
        read_prompts(MergeConfig(*WHAT, prompts=file))


def test_the_files_of_a_sharded_model_and_of_an_adapter_and_no_others(tmp_path: Path) -> None:
    base = write_small_model(tmp_path / "base", "llama", layers=1)
    write_adapter(base, tmp_path / "adapter")
    peer = transformers.AutoModelForCausalLM.from_pretrained(base)
    peer.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    for name in ("modeling.py", "pytorch_model.bin", ".env", "optimizer.safetensors"):
        for place in ("sharded", "adapter"):
            (tmp_path / place / name).write_bytes(b"x")
    names = list_own_files(tmp_path / "sharded", "model")
    assert set(names) == {path.name for path in (tmp_path / "sharded").iterdir()} - {
        "modeling.py",
        "pytorch_model.bin",
        ".env",
        "optimizer.safetensors",
    }
    (tmp_path / "again").mkdir()
    for name in names:
        shutil.copy(tmp_path / "sharded" / name, tmp_path / "again" / name)
    assert all(map(torch.equal, load_model(tmp_path / "again").parameters(), load_model(base).parameters()))
    assert list_own_files(tmp_path / "adapter", "adapter") == ["adapter_config.json", "adapter_model.safetensors"]
