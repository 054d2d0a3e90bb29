"""Whole runs that are killed, cut off from power, damaged, refused by a full disk or stopped: each ends with the bytes
of an undisturbed run.

A trial is a run of six steps (LoRA with dropout, two batches a step, three epochs, evaluation) in a process forked off
this one. TRIALS holds how many there are of a kind; MINIPEFT_TRIALS multiplies them: 0.3 by default, 1 for all of them.
"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from minipeft import cli
from minipeft.cli import train as make_train_command
from minipeft.errors import InputError
from minipeft.files import lock_folder
from minipeft.models import products
from minipeft.runs import checkpoints as runs
from minipeft.runs import finetune as tuning
from minipeft.runs.config import RunConfig, find_methods, run_config
from minipeft.runs.finetune import finetune
from tests.faulty_disk import GROWS, Disk, power_cut, write_tree
from tests.small import write_pairs, write_small_model

SCALE = float(os.environ.get("MINIPEFT_TRIALS", "0.3"))
TRIALS = {"random kills": 250, "power cuts": 400, "damages": 500, "signals": 50}
SETTINGS = {"method": "lora", "targets": ("c_attn",), "rank": 2, "dropout": 0.2, "steps": 6, "accumulate": 2,
            "length": 64, "held_out": 2, "evaluate_every": 2, "save_every": 1}  # fmt: skip
IGNORED = {"timing.json", ".lock"}  # what says how long it took and whose it was; all else is compared


def trials(kind: str) -> int:
    return max(3, round(TRIALS[kind] * SCALE))


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """No progress bars, no measuring of this machine's speed, one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "tqdm", partial(tqdm, disable=True))
        patch.setattr(tuning, "estimate", lambda *_: "so many steps at a learning rate of so much")
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder in memory, if possible: the test is about the order of calls, not the disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        write_small_model(Path(folder) / "model", layers=1)
        write_pairs(Path(folder) / "pairs.jsonl", 8)
        yield Path(folder)


def config_of(place: Path, **changes: Any) -> RunConfig:
    """The trials' settings with some changes; settings that another method lacks are left out."""
    given = {"model": str(place / "model"), "data": str(place / "pairs.jsonl"), **SETTINGS, **changes}
    method = given.pop("method")
    own = {name: value for name, value in given.items() if name in changes or has(method, name)}
    return run_config(method, **own)


def has(method: str, name: str) -> bool:
    having = find_methods(name.replace("_", "-"))
    return method in having


def run(place: Path, out: Path, say: Callable[[str], None] = lambda _: None, **changes: Any) -> dict[str, Any]:
    return finetune(config_of(place, **changes), out, resume=True, say=say)


@pytest.fixture(scope="module")
def wanted(place: Path) -> dict[str, bytes]:
    """All files of the undisturbed run."""
    assert run(place, place / "wanted")["resumed_at"] == 0
    held = files_of(place / "wanted")
    assert {"log.jsonl", "run.json", "result.json", "adapter/adapter_model.safetensors"} < set(held)
    assert held["log.jsonl"].count(b"dev_loss") == 4
    return held


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of a run with its newest checkpoint only: a stopped run may have one more."""
    found = (path for path in folder.rglob("*") if path.is_file())
    held = {str(p.relative_to(folder)): p.read_bytes() for p in found if p.name not in IGNORED}
    older = sorted({name.split("/")[1] for name in held if name.startswith("checkpoints/step-")})[:-1]
    return {name: data for name, data in held.items() if not any(f"/{step}/" in name for step in older)}


def forked(action: Callable[[], object], before: Callable[[int], None] | None = None) -> int:
    """Run a function in a forked process; `before` gets its id. Returns its status, or -signal."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            done = action()
            status = done if isinstance(done, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if before is not None:
        before(child)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def same(place: Path, out: Path, wanted: dict[str, bytes], **changes: Any) -> dict[str, Any]:
    """Resume to the end and compare every file with those of the undisturbed run."""
    result = run(place, out, **changes)
    held = files_of(out)
    assert set(held) == set(wanted)
    assert [name for name in held if held[name] != wanted[name]] == []
    shutil.rmtree(out)
    return result


def test_the_same_run_twice_is_the_same(place: Path, wanted: dict[str, bytes]) -> None:
    """The control: without it, equal bytes after a resume could be luck; another seed gives other bytes."""
    same(place, place / "again", wanted)
    run(place, place / "other", seed=1)
    other = files_of(place / "other")
    assert other["adapter/adapter_model.safetensors"] != wanted["adapter/adapter_model.safetensors"]


def test_killed_at_every_call(place: Path, wanted: dict[str, bytes]) -> None:
    """SIGKILL before and within each call that changes the folder, from its creation to the result."""
    with Disk(place / "counted") as disk:
        run(place, place / "counted")
    calls = len(disk.calls)
    assert 2 * calls >= 250
    ways = list(itertools.product(range(calls), ("kill", "tear")))
    for number, how in ways[:: round(1 / SCALE) | 1]:  # an odd step takes both ways
        out = place / f"{how}-{number}"

        def die(out: Path = out, number: int = number, how: str = how) -> None:
            with Disk(out, at=number, how=how):
                run(place, out)

        assert forked(die) == -signal.SIGKILL, disk.calls[number]
        same(place, out, wanted)


def test_killed_at_random_times(place: Path, wanted: dict[str, bytes]) -> None:
    draw = random.Random(0)
    begun = time.perf_counter()
    assert forked(lambda: run(place, place / "timed")) == 0
    lasts, killed, ended = time.perf_counter() - begun, 0, 0
    while killed < trials("random kills"):

        def kill(child: int, most: float = 0.95 * lasts) -> None:
            time.sleep(draw.uniform(0, most))
            os.kill(child, signal.SIGKILL)

        out = place / f"random-{killed}-{ended}"
        if forked(lambda out=out: run(place, out), kill) == -signal.SIGKILL:  # type: ignore[misc]
            killed += 1
        else:
            ended, lasts = ended + 1, 0.98 * lasts  # it had ended before: this machine is faster than it was
        same(place, out, wanted)
        assert ended < 5 * trials("random kills")


def recorded(place: Path) -> tuple[list[Any], list[tuple[int, int]]]:
    """The calls of a whole run, and at which call which step was committed."""
    committed = []
    plain = runs.Run.save
    shutil.rmtree(place / "cut", ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch, Disk(place / "cut") as disk:

        def save(self: runs.Run, model: Any, state: Any) -> None:
            plain(self, model, state)
            committed.append((len(disk.calls), state.step))

        patch.setattr(runs.Run, "save", save)
        run(place, place / "cut")
    return disk.calls, committed


def survives(place: Path, wanted: dict[str, bytes], tree: Any, least: int) -> str:
    """Whether a run resumes after a power cut: "" or the fault."""
    out = place / "cut"
    shutil.rmtree(out, ignore_errors=True)
    write_tree(tree, out)
    lines: list[str] = []
    try:
        result = run(place, out, say=lines.append)
    except InputError as error:
        return f"refused: {error}"
    ended = any("is complete" in line for line in lines)  # what it returns then is what it returned before
    if not ended and result["resumed_at"] < least:
        return f"went back to step {result['resumed_at']}, but {least} was committed"
    held = files_of(out)
    odd = [name for name in held.keys() | wanted.keys() if held.get(name) != wanted.get(name)]
    return f"other bytes: {odd}" if odd else ""


def test_power_cuts(place: Path, wanted: dict[str, bytes]) -> None:
    """Unsynced data is kept, lost or kept in part: the state is never older than the last committed one."""
    calls, committed = recorded(place)
    draw = random.Random(0)
    faults = []
    for number in range(trials("power cuts")):
        at = 1 + number % len(calls) if number < len(calls) else draw.randint(1, len(calls))
        least = max((step for call, step in committed if call <= at), default=0)
        faults.append(survives(place, wanted, power_cut(calls[:at], place / "cut", draw), least))
    assert [fault for fault in faults if fault] == []


def test_power_cuts_without_sync_are_seen(place: Path, wanted: dict[str, bytes]) -> None:
    """The control: if no sync did anything, the same test would fail."""
    calls, committed = recorded(place)
    draw = random.Random(0)
    faults = []
    for _ in range(12):
        at = draw.randint(committed[1][0], len(calls))
        least = max(step for call, step in committed if call <= at)
        tree = power_cut(calls[:at], place / "cut", draw, syncs=False)
        faults.append(survives(place, wanted, tree, least))
    assert sum(map(bool, faults)) >= 3, faults


def stop_after_saving(place: Path, out: Path) -> None:
    """Make a run folder as it is after step 5 of 6, with two checkpoints."""
    plain = runs.Run.save

    class Enough(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:

        def save(self: runs.Run, model: Any, state: Any) -> None:
            plain(self, model, state)
            if state.step == 5:
                raise Enough

        patch.setattr(runs.Run, "save", save)
        with pytest.raises(Enough):
            run(place, out)


@pytest.fixture(scope="module")
def stopped(place: Path) -> Path:
    """A stopped run, which no test changes."""
    stop_after_saving(place, place / "stopped")
    assert sorted(p.name for p in (place / "stopped/checkpoints").iterdir()) == ["step-000004", "step-000005"]
    return place / "stopped"


def damage(data: bytes, draw: random.Random) -> bytes:
    """A flipped bit, a lost end, a block of zeros, or a byte too many."""
    kind = draw.choice(["flip", "cut", "zero", "more"])
    at = draw.randrange(len(data))
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    if kind == "more":
        return data + bytes([draw.randrange(256)])
    return data[:at] + bytes(min(512, len(data) - at)) + data[at + 512 :]


def test_damaged_checkpoints(place: Path, stopped: Path, wanted: dict[str, bytes]) -> None:
    """Each damage to a file of the newest checkpoint is found; the one before it is used, and one line reports it."""
    draw, done = random.Random(0), 0
    names = ["state.safetensors", "manifest.json"]
    while done < trials("damages"):
        out = place / "damaged"
        shutil.copytree(stopped, out)
        file = out / "checkpoints/step-000005" / names[done % 2]
        data = file.read_bytes()
        spoilt = damage(data, draw)
        if spoilt == data:  # zeros where there were zeros
            shutil.rmtree(out)
            continue
        file.write_bytes(spoilt)
        lines: list[str] = []
        assert same(place, out, wanted, say=lines.append)["resumed_at"] == 4
        warned = [line for line in lines if "damaged" in line]
        assert len(warned) == 1
        assert str(file) in warned[0]
        done += 1


@pytest.mark.parametrize("name", ["state.safetensors", "manifest.json"])
def test_a_missing_file_is_a_damage(name: str, place: Path, stopped: Path, wanted: dict[str, bytes]) -> None:
    shutil.copytree(stopped, place / "missing")
    (place / "missing/checkpoints/step-000005" / name).unlink()
    assert same(place, place / "missing", wanted)["resumed_at"] == 4


def test_every_checkpoint_damaged_is_an_error_that_lists_them(place: Path, stopped: Path) -> None:
    out = place / "hopeless"
    shutil.copytree(stopped, out)
    for file in out.rglob("state.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    before = files_of(out)
    with pytest.raises(InputError) as error:
        run(place, out)
    assert str(error.value).startswith(f"{out}: every checkpoint is damaged: ")
    assert all(f"step-00000{n}/state.safetensors: damaged: " in str(error.value) for n in (4, 5))
    assert files_of(out) == before


def test_a_damaged_log_is_put_aside(place: Path, stopped: Path, wanted: dict[str, bytes]) -> None:
    out = place / "logless"
    shutil.copytree(stopped, out)
    log = out / "log.jsonl"
    log.write_bytes(log.read_bytes()[:100])
    lines: list[str] = []
    assert run(place, out, say=lines.append)["resumed_at"] == 5
    assert any("log.jsonl: damaged, kept as log.jsonl.damaged" in line for line in lines)
    held = files_of(out)
    assert held.pop("log.jsonl.damaged") == wanted["log.jsonl"][:100]
    assert wanted["log.jsonl"].endswith(held.pop("log.jsonl"))
    assert all(held[name] == wanted[name] for name in held if not name.endswith("manifest.json"))  # sums the log


def test_a_full_disk_at_every_write(place: Path, wanted: dict[str, bytes]) -> None:
    """ENOSPC at each call that takes room: the error names path and bytes; with room again the run ends the same."""
    with Disk(place / "counted2") as disk:
        run(place, place / "counted2")
    asked = [number for number, call in enumerate(disk.calls) if call[0] in GROWS]
    for number in asked[:: max(1, round(1 / SCALE))]:
        out, kind = place / f"full-{number}", disk.calls[number][0]
        with pytest.raises(InputError) as error, Disk(out, at=number, how="full"):
            run(place, out)
        said = str(error.value)
        assert str(out) in said
        assert "No space left on device" in said
        if kind == "write":
            assert any(part.replace(",", "").strip("(").isdigit() for part in said.split()), said
        steps = sorted((out / "checkpoints").glob("step-*"))
        for folder in steps:
            runs.verify(folder)
        assert not list(out.glob("checkpoints/.tmp*")), "half a checkpoint keeps room that is needed"
        ended = (out / "result.json").exists()  # refused by the very last sync
        result = same(place, out, wanted)
        assert ended or result["resumed_at"] == (int(steps[-1].name[5:]) if steps else 0)


def test_a_real_full_disk(place: Path, tmp_path: Path, wanted: dict[str, bytes]) -> None:
    """A tmpfs of 128 KiB that something else fills while the run goes on."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
    try:
        made = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if made.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {made.stderr.strip()}")
    try:
        filler, plain = mount / "filler", runs.Run.save
        with pytest.MonkeyPatch.context() as patch:

            def save(self: runs.Run, model: Any, state: Any) -> None:
                if state.step == 3:
                    fill(filler)
                plain(self, model, state)

            patch.setattr(runs.Run, "save", save)
            with pytest.raises(InputError, match=r"small/run/checkpoints.*cannot write [\d,]+ bytes: No space left"):
                run(place, mount / "run")
        assert sorted(p.name for p in (mount / "run/checkpoints").iterdir()) == ["step-000001", "step-000002"]
        for n in (1, 2):
            runs.verify(mount / f"run/checkpoints/step-00000{n}")
        with pytest.raises(InputError, match="cannot write 65,536 bytes: No space left"):
            run(place, mount / "run")
        filler.unlink()
        assert same(place, mount / "run", wanted)["resumed_at"] == 2
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def fill(file: Path) -> None:
    """Write until the disk is full."""
    with open(file, "wb", buffering=0) as stream, suppress(OSError):
        while True:
            stream.write(bytes(1024))


ARGUMENTS = [
    part
    for name, value in SETTINGS.items()
    for part in (
        f"--{name.replace('_', '-')}",
        value if isinstance(value, str) else ",".join(value) if isinstance(value, tuple) else str(value),
    )
]


def command(place: Path, out: Path, *more: str) -> list[str]:
    named = ["--model", str(place / "model"), "--data", str(place / "pairs.jsonl"), "--out", str(out)]
    return ["train", *named, *ARGUMENTS, *more]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals(number: signal.Signals, place: Path) -> None:
    """On a signal a run saves its last finished step and exits with the signal's status; nothing is lost."""
    draw, long = random.Random(int(number)), {"steps": 60, "save_every": 1000}
    lasts = float(run(place, place / f"long{number}", **long)["train_seconds"])
    wanted = files_of(place / f"long{number}")
    stopped = 0
    for trial in range(trials("signals")):
        out = place / f"signal-{number}-{trial}"
        reader, writer = os.pipe()

        def train(out: Path = out, writer: int = writer) -> int:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    make_train_command,
                    "report",
                    lambda line: os.write(writer, b"!") if " steps at a learning" in line else None,
                )
                return cli.main([*command(place, out), "--steps", "60", "--save-every", "1000"])

        def ask(child: int, reader: int = reader, writer: int = writer) -> None:
            os.close(writer)
            assert os.read(reader, 1)  # until then no step has begun, and a signal just ends the process
            time.sleep(0.02 + draw.uniform(0, 0.8 * lasts))
            os.kill(child, number)

        status = forked(train, ask)
        os.close(reader)
        if status != 0:  # else it had ended before
            stopped += 1
            assert status == 128 + number
            saved = sorted((out / "checkpoints").iterdir())[-1]
            last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"]
            assert saved.name == f"step-{last:06d}", "every step that was logged is saved"
        same(place, out, wanted, **long)
    assert stopped >= 0.6 * trials("signals")


def test_a_second_interrupt_stops_at_once(place: Path, wanted: dict[str, bytes]) -> None:
    reader, writer = os.pipe()

    def train() -> int:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with pytest.MonkeyPatch.context() as patch:

            def slow(*_: Any) -> float:
                os.write(writer, b"!")
                time.sleep(60)
                return 1.0

            patch.setattr("minipeft.training.loop.backward", slow)
            return cli.main(command(place, place / "twice"))

    waited = 0.0

    def ask(child: int) -> None:
        nonlocal waited
        os.read(reader, 1)
        os.kill(child, signal.SIGINT)
        time.sleep(0.3)
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the first waits for the step's end"
        waited = time.perf_counter()
        os.kill(child, signal.SIGINT)

    assert forked(train, ask) == 130
    assert time.perf_counter() - waited < 5
    same(place, place / "twice", wanted)


@pytest.mark.parametrize("where", ["weight", "exp_avg", "exp_avg_sq", "gradient", "loss"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_saved(where: str, value: float, place: Path, wanted: dict[str, bytes]) -> None:
    from minipeft.training import adamw, loop

    name = "transformer.h.0.attn.c_attn.lora_B"
    plain_update, plain_backward = adamw.update, loop.backward

    def update(parameters: Any, state: Any, *rest: Any) -> None:
        plain_update(parameters, state, *rest)
        if state.step == 2:
            with torch.no_grad():
                (parameters if where == "weight" else getattr(state, where))[name].view(-1)[3] = value

    def backward(model: Any, batch: Any, targets: int, seed: int) -> float:
        loss = plain_backward(model, batch, targets, seed)
        steps = json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"]
        if steps == 2 and where == "gradient":
            model.get_parameter(name).grad.view(-1)[3] = value
        return value if steps == 2 and where == "loss" else loss

    out = place / f"bad-{where}-{value}"
    with pytest.MonkeyPatch.context() as patch:
        if where in ("gradient", "loss"):
            patch.setattr(loop, "backward", backward)
        else:
            patch.setattr(adamw, "update", update)
        with pytest.raises(InputError) as error:
            run(place, out)
    said = json.loads((out / "log.jsonl").read_text().splitlines()[-1])["error"]
    assert said == str(error.value)
    assert said.startswith("step 3: ")
    assert name in said or where == "loss"
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    assert same(place, out, wanted)["resumed_at"] == 2


def test_an_ended_run_is_left_alone(place: Path, wanted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    out = place / "wanted"
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    monkeypatch.setattr("minipeft.runs.preparation.load_model", None)  # not even the model is loaded
    lines: list[str] = []
    result = run(place, out, say=lines.append)
    assert lines == ["the run is complete: 0 steps left, nothing is written"]
    assert result["steps"] == 6
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert files_of(out) == wanted


def test_an_ended_run_whose_adapter_was_lost_writes_it_again(place: Path, wanted: dict[str, bytes]) -> None:
    out = place / "lost"
    shutil.copytree(place / "wanted", out)
    file = out / "adapter/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert same(place, out, wanted)["resumed_at"] == 6


def test_other_arguments_are_refused_with_both_values(place: Path, stopped: Path) -> None:
    before = files_of(stopped)
    for changes, said in (
        ({"seed": 5}, "seed: 0 -> 5"),
        ({"rank": 3, "dropout": 0.0}, "rank: 2 -> 3, dropout: 0.2 ->"),
    ):
        with pytest.raises(InputError) as error:
            run(place, stopped, **changes)
        assert str(error.value).startswith(f"{stopped}/run.json: this run was started differently (")
        assert said in str(error.value)
    with pytest.raises(InputError, match=r"data_sha256: '\w+' -> '\w+'"):
        finetune(config_of(place, data=str(write_pairs(place / "more.jsonl", 9))), stopped, resume=True)
    torch.set_num_threads(2)
    try:
        with pytest.raises(InputError, match="threads: 1 -> 2"):
            run(place, stopped)
    finally:
        torch.set_num_threads(1)
    assert files_of(stopped) == before


@pytest.mark.parametrize("begun", ["onednn", "torch"])
def test_what_multiplies_is_kept(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: str) -> None:
    """A run that began with oneDNN's products resumes with them, or is refused; and the other way round."""
    monkeypatch.setattr(products, "is_exact", lambda: True)
    monkeypatch.setattr(products.Switch, "wanted", begun == "onednn")
    out = tmp_path / "run"
    stop_after_saving(place, out)
    assert json.loads((out / "run.json").read_text())["products"] == begun
    products.use_onednn(begun == "torch")
    other = "torch" if begun == "onednn" else "onednn"
    with pytest.raises(InputError, match=f"products: '{begun}' -> '{other}'"):
        run(place, out)
    products.use_onednn(begun == "onednn")
    run(place, out)
    whole = tmp_path / "whole"
    run(place, whole)
    assert files_of(out) == files_of(whole)


def test_how_often_it_saves_may_change(place: Path, stopped: Path, wanted: dict[str, bytes]) -> None:
    out = place / "seldom"
    shutil.copytree(stopped, out)
    run(place, out, save_every=50)
    held = files_of(out)
    assert all(held[name] == wanted[name] for name in ("log.jsonl", "result.json", "adapter/adapter_model.safetensors"))


def test_a_folder_in_use_is_refused_with_the_process(place: Path, tmp_path: Path) -> None:
    ready, done = os.pipe(), os.pipe()

    def hold() -> None:
        lock = lock_folder(tmp_path)
        os.write(ready[1], b"!")
        os.read(done[0], 1)
        lock.close()

    def other(child: int) -> None:
        os.read(ready[0], 1)
        with pytest.raises(InputError, match=f"{tmp_path}: in use by process {child}"):
            run(place, tmp_path)
        os.write(done[1], b"!")

    assert forked(hold, other) == 0
    run(place, tmp_path)  # who held it is gone


def test_without_a_checkpoint_it_starts_at_0_and_says_so(place: Path, tmp_path: Path, wanted: dict[str, bytes]) -> None:
    lines: list[str] = []
    run(place, tmp_path / "new", say=lines.append)
    assert "note: no checkpoint yet: starting at step 0" in lines
    assert files_of(tmp_path / "new") == wanted


def test_a_folder_that_holds_something_is_not_taken(place: Path, tmp_path: Path) -> None:
    for name in ("model", "adapter"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("precious")
    before = files_of(tmp_path)
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match=r"is not empty \(adapter, model\)"):
            finetune(config_of(place), tmp_path, say=lambda _: None, **how)
    assert files_of(tmp_path) == before


def test_overwrite_starts_anew(place: Path, stopped: Path, wanted: dict[str, bytes]) -> None:
    out = place / "anew"
    shutil.copytree(stopped, out)
    with pytest.raises(InputError, match="is not empty"):
        finetune(config_of(place), out, say=lambda _: None)
    assert finetune(config_of(place), out, overwrite=True, say=lambda _: None)["resumed_at"] == 0
    assert files_of(out) == wanted
    with pytest.raises(InputError, match="resume, overwrite: cannot go together"):
        finetune(config_of(place), out, overwrite=True, resume=True)


def test_a_bad_folder_is_found_before_the_model(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minipeft.runs.preparation.load_model", None)
    (tmp_path / "file").write_text("")
    for out, said in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file/run", "cannot write"),
        (Path("/proc/run"), "cannot write"),
    ):
        with pytest.raises(InputError, match=said) as error:
            run(place, out)
        assert str(error.value).startswith(str(out))
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"the disk has 100,000 bytes free, but 3 checkpoints and the result take"):
        run(place, tmp_path / "full", method="full")


def test_out_of_memory_says_what_to_do(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(*_: Any) -> float:
        torch.empty(2**50)
        raise AssertionError("there is a pebibyte")

    monkeypatch.setattr("minipeft.training.loop.backward", hungry)
    with pytest.raises(InputError) as error:
        run(place, tmp_path / "big", batch=3)
    said = str(error.value)
    assert said.startswith("cpu: out of memory with batches of 3 x 64 tokens (peak ")
    assert all(remedy in said for remedy in ("--batch", "--length", "--activation-checkpointing"))


METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"dropout": 0.3},
    "lora, checkpointing": {"activation_checkpointing": True, "batch": 2},
    "ln_tuning": {"method": "ln_tuning", "targets": "default"},
    "prefix": {"method": "prefix", "virtual_tokens": 3, "reparam_width": 8},
    "prompt": {"method": "prompt", "virtual_tokens": 3},
    "prompt, network": {"method": "prompt", "virtual_tokens": 3, "reparam_width": 8, "loss_mask": "response"},
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_method_resumes_exactly(name: str, family: str, place: Path) -> None:
    """Killed in the middle, for each method and family, with packing, accumulation, evaluation and several epochs."""
    model = place / f"model-{family}"
    if not model.exists():
        write_small_model(model, family)
    targets = ("c_attn",) if family == "gpt2" else ("q_proj", "v_proj")
    given: dict[str, Any] = {"model": str(model), "steps": 6, "length": 96, **METHODS[name]}
    shared = config_of(place, **given, **({} if "method" in METHODS[name] else {"targets": targets}))
    finetune(shared, place / "whole", say=lambda _: None)
    plain = runs.Run.save

    def die() -> None:
        def save(self: runs.Run, model: Any, state: Any) -> None:
            plain(self, model, state)
            if state.step == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        runs.Run.save = save  # type: ignore[method-assign]
        finetune(shared, place / "part", say=lambda _: None)

    assert forked(die) == -signal.SIGKILL
    assert finetune(shared, place / "part", resume=True, say=lambda _: None)["resumed_at"] == 3
    assert files_of(place / "part") == files_of(place / "whole")
    shutil.rmtree(place / "part"), shutil.rmtree(place / "whole")


def test_a_new_process_goes_on_exactly(place: Path, stopped: Path, wanted: dict[str, bytes]) -> None:
    """By the command itself, in an interpreter of its own."""
    out = place / "fresh"
    shutil.copytree(stopped, out)
    arguments = [*command(place, out), "--resume", "--threads", "1", "--json"]
    environment = {**os.environ, "TQDM_DISABLE": "1", "PYTHONHASHSEED": "7"}
    ran = subprocess.run(
        [sys.executable, "-m", "minipeft", *arguments], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["resumed_at"] == 5
    assert files_of(out) == wanted
