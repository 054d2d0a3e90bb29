"""A process that is killed or stopped is named, the others end, and a restart goes on to the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from minipeft.training.watch import LOST_STATUS
from tests.ranks import LIMIT, joined, kill_after, run_joined, same, start_all, train, wait_all


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

        children = start_all(2, out, die)
        assert wait_all([children[killed]]) == [-signal.SIGKILL]
        survivor = wait_all([children[1 - killed]], 30)  # seconds; then it is killed
        assert survivor == [LOST_STATUS], (out / f"rank-{1 - killed}.txt").read_text()
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
    first = int((tmp_path / "run/.lock").read_text().split()[0])
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
