"""Sharded weights (FSDP2, gloo): with an adapter the bits of one process, with full tuning its numbers."""

import ctypes
import gc
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from minipeft.models import FAMILIES
from minipeft.models.checkpoint import load_model, save_model
from minipeft.runs import finetune as tuning
from minipeft.runs import preparation
from minipeft.runs.config import run_config
from minipeft.training import loop
from minipeft.training.processes import Processes
from tests.ranks import joined, kill_after, read_tensors, refused, run_joined, same, start_all, train, wait_all
from tests.small import LLAMA, write_tokenizer

SHARDED: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, llama, checkpointing": {"model": "llama", "targets": "all-linear", "activation_checkpointing": True},
    "prefix": {"method": "prefix", "virtual_tokens": 3, "reparam_width": 8},
    "dora": {"dora": True},
}


@pytest.mark.parametrize(("name", "size"), list(zip(SHARDED, (2, 4, 2, 4))))
def test_sharded_weights_change_no_bit(name: str, size: int, place: Path, tmp_path: Path) -> None:
    """All files of the run, with evaluation; each rank holds its share of the frozen weights."""
    changes = dict(SHARDED[name])
    if "model" in changes:
        changes["model"] = str(place / changes["model"])
    whole = place / f"whole-sharded-{name}"
    if not whole.exists():
        train(place, whole, **changes)
    held: list[int] = []
    plain = tuning.train_and_save

    def count(run: Any, work: Any, signals: list[int]) -> Any:
        frozen = [p for p in work.model.parameters() if not p.requires_grad]
        whole = sum(p.numel() for p in frozen)
        held.append(sum(p.to_local().numel() for p in frozen))
        assert 0.5 * whole / size <= held[0] <= 1.1 * whole / size + 100, (held, whole)  # the last rank's are smaller
        return plain(run, work, signals)

    def act(processes: Processes) -> None:
        tuning.train_and_save = count
        train(place, tmp_path / "run", processes, **changes)

    run_joined(size, tmp_path, act, shard=True)
    same(whole, tmp_path / "run")


def test_the_fast_sum_of_gradients_beside_sharded_weights(place: Path, whole: Path, tmp_path: Path) -> None:
    """Its all-reduces run while FSDP gathers the weights of backward; within 1e-6."""
    run_joined(2, tmp_path, lambda p: train(place, tmp_path / "run", p) and None, shard=True, reduce="fast")
    fast, exact = (read_tensors(folder / "adapter/adapter_model.safetensors") for folder in (tmp_path / "run", whole))
    assert max((fast[name] - exact[name]).abs().max().item() for name in exact) < 1e-6


def anonymous_bytes() -> int:
    """The memory that this process does not share with a file."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_no_rank_holds_a_copy_of_the_base(place: Path, tmp_path: Path) -> None:
    """64 MB of frozen weights on 4 ranks: the peak of each, sampled while it loads and shards, is far below them."""
    width, layers = 256, 24
    shape = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": 8,
        "num_hidden_layers": layers,
    }
    model = FAMILIES["llama"].decoder(FAMILIES["llama"].config(**LLAMA | shape | {"num_key_value_heads": 8}))
    model.initialize(torch.Generator().manual_seed(0))
    save_model(model, tmp_path / "model")
    whole = 4 * sum(p.numel() for p in model.parameters())
    assert whole > 60e6
    write_tokenizer(tmp_path / "model")
    config = run_config("lora", model=str(tmp_path / "model"), data=str(place / "pairs.jsonl"), rank=2)
    tokenizer = preparation.load_tokens(config.model)

    def measure(action: Callable[[], object]) -> int:
        """How far the anonymous memory rises at most while an action runs."""
        gc.collect()  # a deleted model lives on in cycles; freed during the action it would hide a copy,
        ctypes.CDLL(None).malloc_trim(0)  # and so would free memory of the heap that is still resident
        before, peak, done = anonymous_bytes(), 0, threading.Event()

        def sample() -> None:
            nonlocal peak
            while not done.wait(0.001):
                peak = max(peak, anonymous_bytes() - before)

        sampler = threading.Thread(target=sample)
        sampler.start()
        held = action()
        done.set()
        sampler.join()
        peak = max(peak, anonymous_bytes() - before)  # with what the action made, which a sample may have missed
        del held
        return peak

    def act(processes: Processes) -> None:
        ctypes.CDLL(None).mallopt(
            -3, 2**16
        )  # M_MMAP_THRESHOLD: return freed tensors at once, as it does those above 32 MB
        peak = measure(lambda: preparation.load_adapted(config, tokenizer, processes))
        assert peak < 0.4 * whole, (peak, whole)  # its quarter, and a block
        if processes.rank == 1:  # the control: a copy would be seen
            assert measure(lambda: [p.detach().clone() for p in preparation.load_base(config).parameters()]) > (
                0.75 * whole
            )

    run_joined(4, tmp_path / "logs", act, shard=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantize": "nf4"}, "shard: the codes and scales of a base in nf4 cannot be sharded. Give --shard or"),
        (
            {"method": "full", "dtype": "bf16"},
            "shard: weights that are sharded and trained must be fp32. Give --dtype fp32",
        ),
        ({"accumulate": 5}, "accumulate: 5 is no multiple of 2 processes, which run sharded weights together. Give"),
    ],
)
def test_what_cannot_be_sharded_is_refused(changes: dict[str, Any], said: str, place: Path, tmp_path: Path) -> None:
    first, second = refused(place, tmp_path, shard=True, **changes)
    assert first == second
    assert first.startswith(said)
    assert not (tmp_path / "run").exists()


def sharded_full(place: Path, model: str) -> dict[str, Any]:
    return {"method": "full", "model": str(place / model), "steps": 4}


@pytest.mark.parametrize(("model", "size"), [("model", 2), ("llama", 4)])
def test_full_tuning_in_shards(
    model: str, size: int, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 1e-6 of one process; saved in several files, which transformers reads."""
    changes = sharded_full(place, model)
    train(place, tmp_path / "one", **changes)
    monkeypatch.setattr(tuning, "SHARD_BYTES", 8192)

    def act(processes: Processes) -> None:
        plain = tuning.train_and_save

        def check(run: Any, work: Any, signals: list[int]) -> Any:
            parts = [p.to_local().numel() for p in work.model.parameters()]
            assert sum(parts) < 1.2 * sum(p.numel() for p in work.model.parameters()) / size + 100
            return plain(run, work, signals)

        tuning.train_and_save = check
        train(place, tmp_path / "run", processes, **changes)

    run_joined(size, tmp_path / "logs", act, shard=True)
    assert len(list((tmp_path / "run/model").glob("model-*-of-*.safetensors"))) > 2
    one, many = (load_model(tmp_path / name / "model").state_dict() for name in ("one", "run"))
    assert set(one) == set(many)
    assert max((one[name] - many[name]).abs().max().item() for name in one) < 1e-6
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    ids = torch.randint(0, 257, (1, 12), generator=torch.Generator().manual_seed(0))
    ours = load_model(tmp_path / "run/model")
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-5
    log = [json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1]) for name in ("one", "run")]
    assert log[0]["grad_norm"] == pytest.approx(log[1]["grad_norm"], rel=1e-5)
    assert log[0]["dev_loss"] == pytest.approx(log[1]["dev_loss"], abs=1e-6)


def test_full_tuning_in_shards_is_killed_on_4_and_resumed_on_2(place: Path, tmp_path: Path) -> None:
    """The checkpoint is whole: the moments and weights of each rank come from it, on any number of ranks."""
    changes = sharded_full(place, "llama")
    run_joined(2, tmp_path / "a", lambda p: train(place, tmp_path / "whole", p, **changes) and None, shard=True)

    def die() -> None:
        kill_after(3, int(os.environ["RANK"]))
        joined(lambda processes: train(place, tmp_path / "run", processes, **changes), shard=True)

    assert wait_all(start_all(4, tmp_path / "b", die)) == [-signal.SIGKILL] * 4
    at = run_joined(
        2, tmp_path / "c", lambda p: print(train(place, tmp_path / "run", p, **changes)["resumed_at"]), shard=True
    )
    assert at.strip() == "2"
    one, many = (load_model(tmp_path / name / "model").state_dict() for name in ("whole", "run"))
    assert 0 <= max((one[name] - many[name]).abs().max().item() for name in one) < 1e-6
    first, second = (
        read_tensors(tmp_path / name / "checkpoints/step-000004/state.safetensors") for name in ("whole", "run")
    )
    assert all((first[name] - second[name]).abs().max() < 1e-6 for name in first)


def test_a_gradient_that_is_not_finite_in_one_shard_ends_all(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = loop.compute_norms

    def spoil(tensors: Any) -> torch.Tensor:
        found = plain(tensors)
        return found * float("nan") if os.environ.get("RANK") == "1" else found

    monkeypatch.setattr(loop, "compute_norms", spoil)
    first, second = refused(place, tmp_path, shard=True, **sharded_full(place, "llama"))
    assert first == second
    assert "is not finite. Lower the learning rate" in first
