"""Training on 2 and 4 processes (gloo, forked here) has the bits of training on one."""

import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tqdm import tqdm

from minipeft.errors import InputError
from minipeft.generation import GenerateConfig
from minipeft.models import FAMILIES
from minipeft.models.checkpoint import load_model, save_model
from minipeft.runs import checkpoints as runs
from minipeft.runs import finetune as tuning
from minipeft.runs.answers import AnswersConfig, answer_data, load_tuned
from minipeft.runs.config import ModelConfig, find_methods, run_config
from minipeft.runs.finetune import finetune
from minipeft.training.launch import join
from minipeft.training.processes import Alone, ParallelConfig, Processes
from minipeft.training.watch import LOST_STATUS
from tests.ranks import LIMIT, run_joined, start_all, wait_all
from tests.small import LLAMA, write_small_model, write_tokenizer

SETTINGS = {"method": "lora", "targets": ("c_attn",), "rank": 2, "dropout": 0.2, "steps": 4, "accumulate": 4,
            "length": 64, "held_out": 3, "evaluate_every": 2, "save_every": 1}  # fmt: skip
IGNORED = {"timing.json", ".lock"}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "tqdm", partial(tqdm, disable=True))
        patch.setattr(tuning, "show_steps", lambda *_: tqdm(disable=True))
        patch.setattr(tuning, "estimate", lambda *_: "so many steps at a learning rate of so much")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    write_small_model(folder / "model", layers=1)
    write_small_model(folder / "llama", "llama")
    rows = [{"intent": f"add {n}", "snippet": f"x += {'1' * (n % 7) or 0}"} for n in range(14)]  # of unequal lengths
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(
    place: Path,
    out: Path,
    processes: Processes | None = None,
    resume: bool = True,
    say: Callable[[str], None] = lambda _: None,
    **changes: Any,
) -> dict[str, Any]:
    given = {"model": str(place / "model"), "data": str(place / "pairs.jsonl"), **SETTINGS, **changes}
    method = given.pop("method")
    own = {
        name: value
        for name, value in given.items()
        if name in changes or method in find_methods(name.replace("_", "-"))
    }
    return finetune(run_config(method, **own), out, resume=resume, say=say, processes=processes)


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of a run with its newest checkpoint only: a stopped run may have one more."""
    found = (path for path in folder.rglob("*") if path.is_file())
    held = {str(p.relative_to(folder)): p.read_bytes() for p in found if p.name not in IGNORED}
    older = sorted({name.split("/")[1] for name in held if name.startswith("checkpoints/step-")})[:-1]
    return {name: data for name, data in held.items() if not any(f"/{step}/" in name for step in older)}


def same(one: Path, other: Path) -> None:
    first, second = files_of(one), files_of(other)
    assert set(first) == set(second)
    assert [name for name in first if first[name] != second[name]] == []


CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, checkpointing, 2 rows": {"activation_checkpointing": True, "batch": 2},
    "lora, 5 micro-batches": {"accumulate": 5, "loss_mask": "response"},
    "prefix, network": {"method": "prefix", "virtual_tokens": 3, "reparam_width": 8},
    "prompt, llama": {"method": "prompt", "virtual_tokens": 3, "model": "llama"},
    "full": {"method": "full"},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [2, 4])
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


def kill_after(step: int, rank: int, number: int = signal.SIGKILL) -> None:
    """Send this process a signal after its update of a step, if it is that rank."""
    plain = tuning.make_log_entry

    def kill(done: Any) -> dict[str, Any]:
        if done.number == step and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), number)
        return plain(done)

    tuning.make_log_entry = kill


def joined(action: Callable[[Processes], object], **settings: Any) -> object:
    with join(ParallelConfig(**settings)) as processes:
        return action(processes)


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The run of one process, of 4 steps."""
    train(place, place / "whole")
    return place / "whole"


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


def test_ten_kills_of_random_ranks_and_restarts(place: Path, tmp_path: Path) -> None:
    """The outer restart, 10 of 10: the survivors end within 30 seconds, name the rank, and the next start goes on."""
    steps = 12
    train(place, tmp_path / "whole", steps=steps)
    draw = random.Random(0)
    for trial in range(10):
        killed = draw.randrange(2)
        out = tmp_path / f"logs-{trial}"

        def die(killed: int = killed, step: int = trial + 2, out: Path = out) -> None:
            kill_after(step, killed)
            joined(lambda processes: train(place, tmp_path / "run", processes, steps=steps))

        begun = time.monotonic()
        statuses = wait_all(start_all(2, out, die), 30)
        assert statuses[killed] == -signal.SIGKILL
        assert statuses[1 - killed] == LOST_STATUS, (out / f"rank-{1 - killed}.txt").read_text()
        assert time.monotonic() - begun < 30
        said = (out / f"rank-{1 - killed}.txt").read_text()
        assert "continue with --resume" in said
        if killed:  # rank 0 holds the store itself here; under torchrun the agent does
            assert "rank 1 (" in said
        else:
            assert "rank 0" in said
    run_joined(2, tmp_path / "last", lambda processes: train(place, tmp_path / "run", processes, steps=steps) and None)
    same(tmp_path / "whole", tmp_path / "run")


def test_a_stopped_rank_is_named_though_its_sockets_are_open(place: Path, tmp_path: Path) -> None:
    """SIGSTOP, like a machine that hangs: no connection is reset, and the others would wait for half an hour."""

    def stop() -> None:
        kill_after(2, 1, signal.SIGSTOP)
        joined(lambda processes: train(place, tmp_path / "run", processes), lost_after=2.0)

    children = start_all(2, tmp_path, stop)
    assert wait_all(children[:1], 25) == [LOST_STATUS]
    os.kill(children[1], signal.SIGKILL)
    os.waitpid(children[1], 0)
    said = (tmp_path / "rank-0.txt").read_text()
    assert f"process {children[1]}) has ended or gives no sign of life, so rank 0 stops: continue with --resume" in said


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


def refused(place: Path, out: Path, reduce: str = "exact", shard: bool = False, **changes: Any) -> list[str]:
    """What each of two ranks says of a run that both of them refuse."""

    def act() -> object:
        try:
            joined(lambda processes: train(place, out / "run", processes, **changes), reduce=reduce, shard=shard)
        except InputError as error:
            print(error)
            return 2
        return None

    assert wait_all(start_all(2, out, act)) == [2, 2]
    return [(out / f"rank-{rank}.txt").read_text() for rank in (0, 1)]


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
    from minipeft.training import loop

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


def test_more_processes_than_micro_batches_are_refused(place: Path, tmp_path: Path) -> None:
    first, _ = refused(place, tmp_path, accumulate=1)
    assert first == (
        "accumulate: 1 micro-batches a step leave 1 of 2 processes without any. "
        "Give --accumulate 2 with a smaller --batch, or start 1 processes\n"
    )
    assert not (tmp_path / "run").exists()


def test_an_environment_of_half_a_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with (
        pytest.raises(InputError, match=r"WORLD_SIZE: is not set, but RANK is\. Start the processes with torchrun"),
        join(),
    ):
        pass
    monkeypatch.delenv("RANK")
    with join() as processes:
        assert isinstance(processes, Alone)


@pytest.mark.parametrize("size", [2, 4])
def test_fast_sums_differ_by_rounding_alone(size: int, place: Path, whole: Path, tmp_path: Path) -> None:
    """Within 1e-6 of the exact run, but not its bits: so the exact tests would see another order."""
    run_joined(size, tmp_path, lambda p: train(place, tmp_path / "run", p) and None, reduce="fast")
    fast, exact = (torch_tensors(folder / "adapter/adapter_model.safetensors") for folder in (tmp_path / "run", whole))
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

    def count(run: Any, work: Any) -> Any:
        frozen = [p for p in work.model.parameters() if not p.requires_grad]
        whole = sum(p.numel() for p in frozen)
        held.append(sum(p.to_local().numel() for p in frozen))
        assert 0.5 * whole / size <= held[0] <= 1.1 * whole / size + 100, (held, whole)  # the last rank's are smaller
        return plain(run, work)

    def act(processes: Processes) -> None:
        tuning.train_and_save = count
        train(place, tmp_path / "run", processes, **changes)

    run_joined(size, tmp_path, act, shard=True)
    same(whole, tmp_path / "run")


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
    tokenizer = tuning.load_tokens(config.model)

    def measure(action: Callable[[], object]) -> int:
        """How far the anonymous memory rises at most while an action runs."""
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
        del held
        return peak

    def act(processes: Processes) -> None:
        ctypes.CDLL(None).mallopt(
            -3, 2**16
        )  # M_MMAP_THRESHOLD: return freed tensors at once, as it does those above 32 MB
        peak = measure(lambda: tuning.load_adapted(config, tokenizer, processes))
        assert peak < 0.4 * whole, (peak, whole)  # its quarter, and a block
        if processes.rank == 1:  # the control: a copy would be seen
            assert measure(lambda: [p.detach().clone() for p in tuning.load_base(config, tokenizer).parameters()]) > (
                0.75 * whole
            )

    run_joined(4, tmp_path / "logs", act, shard=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantize": "nf4"}, "shard: the codes and scales of a base in nf4 cannot be sharded. Give --shard or"),
        ({"accumulate": 5}, "accumulate: 5 is no multiple of 2 processes, which run sharded weights together. Give"),
    ],
)
def test_what_cannot_be_sharded_is_refused(changes: dict[str, Any], said: str, place: Path, tmp_path: Path) -> None:
    first, second = refused(place, tmp_path, shard=True, **changes)
    assert first == second
    assert first.startswith(said)
    assert not (tmp_path / "run").exists()


def test_a_flag_for_several_processes_is_refused_for_one() -> None:
    with (
        pytest.raises(InputError, match="shard: has no effect on a process that trains alone"),
        join(ParallelConfig(shard=True)),
    ):
        pass


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

        def check(run: Any, work: Any) -> Any:
            parts = [p.to_local().numel() for p in work.model.parameters()]
            assert sum(parts) < 1.2 * sum(p.numel() for p in work.model.parameters()) / size + 100
            return plain(run, work)

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
        torch_tensors(tmp_path / name / "checkpoints/step-000004/state.safetensors") for name in ("whole", "run")
    )
    assert all((first[name] - second[name]).abs().max() < 1e-6 for name in first)


def test_a_gradient_that_is_not_finite_in_one_shard_ends_all(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minipeft.training import loop

    plain = loop.compute_norms

    def spoil(tensors: Any, order: float = 2.0) -> torch.Tensor:
        found = plain(tensors, order)
        return found * float("nan") if os.environ.get("RANK") == "1" else found

    monkeypatch.setattr(loop, "compute_norms", spoil)
    first, second = refused(place, tmp_path, shard=True, **sharded_full(place, "llama"))
    assert first == second
    assert "is not finite. Lower the learning rate" in first


def torch_tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def test_a_run_of_torchrun_is_killed_and_goes_on(place: Path, tmp_path: Path) -> None:
    """The command itself: rank 0 is killed, rank 1 names it and ends, and the run goes on to the same bytes."""
    command = ["-m", "minipeft", "train", "--model", str(place / "model"), "--data", str(place / "pairs.jsonl")]
    command += ["--targets", "c_attn", "--rank", "2", "--dropout", "0.2", "--steps", "100", "--accumulate", "4"]
    command += ["--length", "64", "--held-out", "3", "--save-every", "5", "--out", str(tmp_path / "run"), "--resume"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    started = subprocess.Popen(launch, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    log, begun = tmp_path / "run/log.jsonl", time.monotonic()
    while not (log.exists() and log.read_bytes().count(b"\n") > 10) and time.monotonic() - begun < LIMIT:
        time.sleep(0.05)
    first = int((tmp_path / "run/.lock").read_text())
    os.kill(first, signal.SIGKILL)
    killed = time.monotonic()
    said = started.communicate(timeout=LIMIT)[1]
    assert time.monotonic() - killed < 30
    assert started.returncode == 1, said
    assert f"process {first}) has ended or gives no sign of life, so rank 1 stops: continue with --resume" in said
    assert not (tmp_path / "run/result.json").exists()
    changes = {"steps": 100, "save_every": 5, "evaluate_every": None}
    run_joined(2, tmp_path / "logs", lambda p: train(place, tmp_path / "run", p, **changes) and None)
    train(place, tmp_path / "whole", **changes)
    same(tmp_path / "whole", tmp_path / "run")
