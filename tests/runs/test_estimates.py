"""The disk check of a run counts the parameters that add_adapter makes."""

import shutil
from pathlib import Path

import pytest
import torch

import minipeft
from minipeft.runs import checkpoints
from minipeft.runs.config import run_config
from minipeft.runs.estimates import check_disk, describe_slow_dtype, describe_slow_threads
from minipeft.runs.planning import probe_threads
from tests.small import write_small_model

METHODS = {
    "full": {},
    "lora": {"rank": 3, "rank_pattern": {"c_attn": 5}},
    "dora": {"rank": 3},
    "pissa": {"rank": 3},
    "ia3": {},
    "ln_tuning": {},
    "prefix": {"virtual_tokens": 3},
    "prefix, MLP": {"virtual_tokens": 3, "reparam_width": 7},
    "prefix, gate": {"virtual_tokens": 3, "gate": True, "init": "normal"},
    "prompt, MLP": {"virtual_tokens": 3, "reparam_width": 7},
}


@pytest.mark.parametrize("name", METHODS)
def test_the_disk_is_checked_for_what_is_trained(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A formula of its own was 3 % off for a prefix with an MLP."""
    write_small_model(tmp_path / "model")
    given = {"model": str(tmp_path / "model"), "data": "", "dtype": "fp32", **METHODS[name]}
    config = run_config(name.split(",")[0], **given)
    model, tokenizer = minipeft.load_model(tmp_path / "model"), minipeft.load_tokenizer(tmp_path / "model")
    trained = minipeft.add_adapter(model, config.adapter, tokenizer).trainable
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "minipeft.runs.estimates.check_space", lambda folder, parameters, more: asked.append((parameters, more))
    )
    check_disk(config, tmp_path)
    assert asked == [(trained, 4 * trained)]


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(minipeft.InputError, match="the disk has 1,000 bytes free, but 3 checkpoints and the result"):
        checkpoints.check_space(tmp_path, 100)


@pytest.mark.parametrize(("fast", "said"), [(5e9, None), (40e9, "4.0 times as long for products in bfloat16")])
def test_a_dtype_that_the_processor_emulates_is_named(
    fast: float, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 without hardware for it takes several times as long as float32."""
    speeds = {torch.float32: fast, torch.bfloat16: 10e9}
    monkeypatch.setattr("minipeft.runs.estimates.probe_flops", lambda dtype, device: speeds[dtype])
    write_small_model(tmp_path)
    model = minipeft.load_model(tmp_path, dtype=torch.bfloat16)
    found = describe_slow_dtype(model)
    assert found is None if said is None else said in str(found)
    assert describe_slow_dtype(minipeft.load_model(tmp_path, dtype=torch.float32)) is None


@pytest.mark.parametrize(
    ("rates", "said"), [((100.0, 150.0), None), ((100.0, 40.0), "2 threads take 2.5 times as long as one")]
)
def test_threads_that_are_slower_than_one_are_named(rates, said, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a busy process the default of all cores is many times slower than one thread."""
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    monkeypatch.setattr("minipeft.runs.estimates.probe_threads", lambda number: rates[number - 1])
    found = describe_slow_threads()
    assert found is None if said is None else said in str(found)
    assert said is None or str(found).endswith("--threads 1 is faster")
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    assert describe_slow_threads() is None


def test_the_probe_of_threads_leaves_their_number_as_it_was() -> None:
    before = torch.get_num_threads()
    assert probe_threads(before + 1) > 0
    assert torch.get_num_threads() == before
