"""Checkpoints: their content and size, how many are kept, and which leftovers are removed at the start of a run."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minipeft.adapters import FullConfig, LoRAConfig, add_adapter
from minipeft.errors import InputError
from minipeft.models import FAMILIES, Decoder
from minipeft.runs.checkpoints import MANIFEST, STATE, Run, check_space, open_run, verify
from minipeft.tensor_files import read_header
from minipeft.training.loop import TrainState, trained
from tests.small import LLAMA


def tuned(rank: int = 1, layers: int = 30, full: bool = False) -> Decoder:
    config, decoder = FAMILIES["llama"].config, FAMILIES["llama"].decoder
    model = decoder(config(**LLAMA | {"num_hidden_layers": layers}))
    model.initialize(torch.Generator().manual_seed(0))
    add_adapter(model, FullConfig() if full else LoRAConfig(rank))
    return model


def opened(folder: Path, **how: bool) -> Run:
    return open_run(folder, {"a": 1}, **{"resume": False, "overwrite": False, **how})


@pytest.mark.parametrize("full", [False, True])
def test_a_checkpoint_weighs_twelve_bytes_a_number(full: bool, tmp_path: Path) -> None:
    """Also for a deep model with rank 1: many tensors, few parameters."""
    model, run = tuned(full=full), opened(tmp_path)
    run.save(model, TrainState(model))
    numbers = sum(p.numel() for p in trained(model).values())
    held = sum(file.stat().st_size for file in run.list_committed()[0].iterdir())
    assert 12 * numbers < held <= 1.01 * 12 * numbers + 64 * 1024
    assert set(os.listdir(run.list_committed()[0])) == {STATE, MANIFEST}
    names = set(read_header(run.list_committed()[0] / STATE))
    assert names == {f"parameter/{name}" for name in trained(model)} | {"exp_avg", "exp_avg_sq"}


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    model, run = tuned(layers=2), opened(tmp_path)
    state = TrainState(model)
    draw = torch.Generator().manual_seed(1)
    for tensors in (trained(model), state.exp_avg, state.exp_avg_sq):
        for tensor in tensors.values():
            tensor.data.normal_(generator=draw)
    state.step = 7
    run.log({"step": 7})
    run.save(model, state)
    run.log({"step": 8})
    run.close()
    other = tuned(layers=2)
    back, again = TrainState(other), opened(tmp_path, resume=True)
    again.restore(other, back)
    assert back.step == 7
    pairs = ((trained(model), trained(other)), (state.exp_avg, back.exp_avg), (state.exp_avg_sq, back.exp_avg_sq))
    assert all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 7}\n'
    with pytest.raises(InputError, match="holds the state of another model"):
        again.restore(tuned(rank=2, layers=2), back)


def test_bfloat16_weights_are_saved_as_such(tmp_path: Path) -> None:
    """Beside float32 moments: ten bytes a number. A float32 run's checkpoint is not rounded into them."""
    model, run = tuned(layers=2, full=True).to(torch.bfloat16), opened(tmp_path)
    state = TrainState(model)
    state.step = 1
    run.save(model, state)
    numbers = sum(p.numel() for p in trained(model).values())
    held = sum(file.stat().st_size for file in run.list_committed()[0].iterdir())
    assert 10 * numbers < held <= 1.01 * 10 * numbers + 64 * 1024
    run.close()
    other = tuned(layers=2, full=True)
    again = opened(tmp_path, resume=True)
    with pytest.raises(InputError, match=r"tensor 'parameter/.*': dtype BF16, want F32"):
        again.restore(other, TrainState(other))
    back = tuned(layers=2, full=True).to(torch.bfloat16)
    with torch.no_grad():
        back.get_parameter("model.norm.weight").zero_()
    again.restore(back, TrainState(back))
    assert all(torch.equal(p, trained(model)[name]) for name, p in trained(back).items())


def test_the_newest_two_stay_by_number(tmp_path: Path) -> None:
    model, run = tuned(layers=1), opened(tmp_path)
    state = TrainState(model)
    for step in (999_998, 999_999, 1_000_000):
        state.step = step
        run.save(model, state)
        os.utime(run.list_committed()[0], (0, 0))  # a clock that jumps decides nothing
    assert [path.name for path in run.list_committed()] == ["step-1000000", "step-999999"]
    stamp = (run.list_committed()[0] / STATE).stat().st_mtime_ns
    run.save(model, state)
    assert (run.list_committed()[0] / STATE).stat().st_mtime_ns == stamp, "what is there is not written again"
    assert verify(run.list_committed()[0])["step"] == 1_000_000


def test_leftovers_are_cleared_away_and_nothing_else(tmp_path: Path) -> None:
    opened(tmp_path).close()
    for name in ("checkpoints/.tmp-step-000001", "checkpoints/.trash-step-000001", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoints/.tmp-step-000001/state.safetensors").write_bytes(b"half")
    (tmp_path / "adapter/.adapter_config.json.abcdefgh").write_bytes(b"half")
    (tmp_path / ".run.json.abcdefgh").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    opened(tmp_path, resume=True).close()
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == [".lock", "adapter", "checkpoints", "log.jsonl", "notes.txt", "run.json"]


def test_space_is_asked_for_before(tmp_path: Path) -> None:
    check_space(tmp_path, 10)
    with pytest.raises(InputError, match=r"bytes free, but 3 checkpoints and the result take 36,000,000,000,000,000"):
        check_space(tmp_path, 10**15)


PLANTED: dict[str, Callable[[Path], object]] = {
    "file": lambda path: path.write_text("mine"),
    "pipe": os.mkfifo,
    "empty folder": lambda path: path.mkdir(),
    "folder without state": lambda path: (path.mkdir(), (path / MANIFEST).write_text("{}")),
    "link to a file": lambda path: path.symlink_to(path.parents[1] / "run.json"),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "link to a folder": lambda path: path.symlink_to(path.parents[1]),
}


@pytest.mark.parametrize("name", ["step-000009", "step-000004", ".tmp-step-000004", ".trash-step-000001", "step-²"])
@pytest.mark.parametrize("kind", PLANTED)
def test_what_else_lies_among_the_checkpoints_stops_no_resume(kind: str, name: str, tmp_path: Path) -> None:
    """It is not loaded as a checkpoint, and a foreign file is not removed."""
    model, run = tuned(layers=1), opened(tmp_path)
    state = TrainState(model)
    for step in (1, 2, 3):
        state.step = step
        run.save(model, state)
    run.close()
    PLANTED[kind](tmp_path / "checkpoints" / name)
    again, back = opened(tmp_path, resume=True), TrainState(model)
    again.restore(model, back)
    assert back.step == 3
    for step in (4, 5):
        back.step = step
        again.save(model, back)
    again.close()
    third, back = opened(tmp_path, resume=True), TrainState(model)
    third.restore(model, back)
    assert back.step == 5
    assert (tmp_path / "run.json").exists(), "what a link leads to stays"
    kept = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file() and path.read_bytes() == b"mine"]
    assert len(kept) == (kind == "file" and not name.startswith("."))


def test_a_log_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    opened(tmp_path).close()
    (tmp_path / "log.jsonl").unlink()
    os.mkfifo(tmp_path / "log.jsonl")
    with pytest.raises(InputError, match=r"log.jsonl: is not a plain file"):
        opened(tmp_path, resume=True)
