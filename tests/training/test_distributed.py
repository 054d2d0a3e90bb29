"""Training on 2 and 4 processes (gloo, forked here) has the bits of training on one."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minipeft.errors import InputError
from minipeft.generation import GenerateConfig
from minipeft.runs import checkpoints as runs
from minipeft.runs import finetune as tuning
from minipeft.runs.answers import AnswersConfig, answer_data, load_tuned
from minipeft.runs.config import ModelConfig
from minipeft.training import loop
from tests.ranks import joined, kill_after, read_tensors, refused, run_joined, same, start_all, train, wait_all

CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, checkpointing, 2 rows": {"activation_checkpointing": True, "batch": 2},
    "lora, 5 micro-batches": {"accumulate": 5, "loss_mask": "response"},
    "prefix, network": {"method": "prefix", "virtual_tokens": 3, "reparam_width": 8},
    "prompt, llama": {"method": "prompt", "virtual_tokens": 3, "model": "llama"},
    "full": {"method": "full"},
    "full, bf16": {"method": "full", "dtype": "bf16", "steps": 2},
    "lora, document by document": {"batch_invariant": True},
}


@pytest.mark.parametrize(("name", "size"), [*zip(CASES, (4, 4, 4, 2, 4, 2, 2, 2)), ("lora", 2)])
def test_exact_sums_have_the_bits_of_one_process(name: str, size: int, place: Path, tmp_path: Path) -> None:
    """Adapter, log, checkpoint and result, with dropout, packing, accumulation, evaluation and unequal lengths."""
    changes = dict(CASES[name])
    if "model" in changes:
        changes["model"] = str(place / changes["model"])
    whole = place / f"whole-{name}"
    if not whole.exists():
        train(place, whole, **changes)
    run_joined(size, tmp_path, lambda processes: train(place, tmp_path / "run", processes, **changes) and None)
    same(whole, tmp_path / "run")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_killed_at_4_and_resumed_at_any_number(size: int, place: Path, whole: Path, tmp_path: Path) -> None:
    """All four are killed at once, as a machine's end kills them; what goes on has other numbers of processes."""

    def die() -> None:
        kill_after(2, int(os.environ["RANK"]))
        joined(lambda processes: train(place, tmp_path / "run", processes))

    assert wait_all(start_all(4, tmp_path, die)) == [-signal.SIGKILL] * 4
    assert not (tmp_path / "run/result.json").exists()
    at = []
    if size == 1:
        at = [train(place, tmp_path / "run")["resumed_at"]]
    else:
        said = run_joined(size, tmp_path, lambda p: print("at", train(place, tmp_path / "run", p)["resumed_at"]))
        at = [int(said.split()[-1])]
    assert at == [1]
    same(whole, tmp_path / "run")


def test_a_signal_to_any_rank_stops_all_at_the_same_step(place: Path, whole: Path, tmp_path: Path) -> None:
    def stop() -> object:
        kill_after(2, 1, signal.SIGTERM)
        try:
            joined(lambda processes: train(place, tmp_path / "run", processes))
        except tuning.Stopped as stopped:
            print(stopped)
            return 3
        return None

    assert wait_all(start_all(2, tmp_path, stop)) == [3, 3]
    for rank in (0, 1):
        assert (tmp_path / f"rank-{rank}.txt").read_text() == "stopped by SIGTERM; saved at step 2\n"
    assert train(place, tmp_path / "run")["resumed_at"] == 2
    same(whole, tmp_path / "run")


def test_a_failed_save_ends_all(place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = runs.write_summed

    def full(file: Path, fill: Callable[[Any], object]) -> dict[str, int]:
        if "step-000003" in str(file):
            raise OSError(28, "No space left on device", str(file))
        return plain(file, fill)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_summed", full)
        first, second = refused(place, tmp_path)
    assert first == second
    assert "step-000003/state.safetensors: cannot write" in first
    assert "No space left on device" in first
    assert train(place, tmp_path / "run")["resumed_at"] == 2
    same(whole, tmp_path / "run")


def test_a_loss_that_is_not_finite_ends_all(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The NaN arises on rank 1 alone."""
    plain = loop.backward

    def spoil(*given: Any) -> float:
        return float("nan") if os.environ.get("RANK") == "1" else plain(*given)

    monkeypatch.setattr(loop, "backward", spoil)
    first, second = refused(place, tmp_path)
    assert first == second == "step 1: the loss is nan. Lower the learning rate or look at the data\n"
    assert json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])["error"] == first.strip()


def test_a_run_in_use_is_refused_on_all(place: Path, whole: Path, tmp_path: Path) -> None:
    with runs.open_run(tmp_path / "run", {}, resume=False, overwrite=False).lock:
        first, second = refused(place, tmp_path)
    assert first == second
    assert f"in use by process {os.getpid()}" in first


@pytest.mark.parametrize("size", [2, 4])
def test_fast_sums_differ_by_rounding_alone(size: int, place: Path, whole: Path, tmp_path: Path) -> None:
    """Within 1e-6 of the exact run, but not its bits: so the exact tests would see another order."""
    run_joined(size, tmp_path, lambda p: train(place, tmp_path / "run", p) and None, reduce="fast")
    fast, exact = (read_tensors(folder / "adapter/adapter_model.safetensors") for folder in (tmp_path / "run", whole))
    assert set(fast) == set(exact)
    differences = [(fast[name] - exact[name]).abs().max().item() for name in exact]
    assert 0 < max(differences) < 1e-6
    assert json.loads((tmp_path / "run/run.json").read_text())["reduce"] == "fast"


def test_a_run_in_exact_order_does_not_go_on_in_a_fast_one(place: Path, tmp_path: Path) -> None:
    train(place, tmp_path / "run", steps=1)
    (tmp_path / "run/result.json").unlink()
    first, second = refused(place, tmp_path, reduce="fast", steps=1)
    assert first == second
    assert "this run was started differently (reduce: None -> 'fast')" in first


@pytest.mark.parametrize("size", [2, 4])
def test_answers_are_those_of_one_process(size: int, place: Path, tmp_path: Path) -> None:
    """Sampled, in batches of 3: the last one is not full, and the ranks have unequal numbers of batches."""
    pairs = str(place / "pairs.jsonl")
    given = {"data": pairs, "generate": GenerateConfig(max_new_tokens=8, temperature=1.0, seed=1, batch=3)}
    source = ModelConfig(str(place / "model"))
    model, tokenizer = load_tuned(AnswersConfig(source))
    answer_data(model, tokenizer, AnswersConfig(source, out=tmp_path / "one.jsonl", **given))  # type: ignore[arg-type]
    many = AnswersConfig(source, out=tmp_path / "many.jsonl", **given)  # type: ignore[arg-type]
    run_joined(size, tmp_path, lambda processes: answer_data(model, tokenizer, many, processes) and None)
    assert (tmp_path / "many.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert (tmp_path / "one.jsonl").read_bytes().count(b"\n") == 14
    assert not (tmp_path / "many.jsonl.part").exists()


def test_other_data_on_one_machine_is_refused_on_all(place: Path, tmp_path: Path) -> None:
    """Each rank reads its own copy of the data: with another one its gradients would be of other rows."""
    rows = (place / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "pairs.jsonl").write_text("".join(rows[:-1]))

    def act() -> object:
        data = tmp_path if os.environ["RANK"] == "1" else place
        try:
            joined(lambda processes: train(place, tmp_path / "run", processes, data=str(data / "pairs.jsonl")))
        except InputError as error:
            print(error)
            return 2
        return None

    assert wait_all(start_all(2, tmp_path, act)) == [2, 2]
    for rank in (0, 1):
        said = (tmp_path / f"rank-{rank}.txt").read_text()
        assert said.startswith("rank 1: differs from rank 0 in data_sha256. All processes need the same arguments")
    assert not (tmp_path / "run").exists()
