"""Programs that mean harm, and pass@k against the mean over all subsets."""

import itertools
import os
import time
from pathlib import Path

import pytest

from minipeft import InputError
from minipeft.metrics import execution
from minipeft.metrics.execution import Limits, count_trials, pass_at_k, run_program, run_programs

SHORT = Limits(seconds=20)


@pytest.fixture(scope="module")
def sandbox():
    """Skip where this kernel gives no user namespaces."""
    try:
        run_program("")
    except InputError as error:
        pytest.skip(str(error))


def fails(program: str, said: str, limits: Limits = SHORT) -> None:
    outcome = run_program(program, limits)
    assert outcome.status == "failed"
    assert said in outcome.said


def test_what_passes_and_what_fails(sandbox):
    found = run_programs(
        ["assert 1 + 1 == 2", "assert 1 + 1 == 3", "import json, numpy", "def", "import os; os._exit(0)"]
    )
    assert [outcome.status for outcome in found] == ["passed", "failed", "passed", "failed", "failed"]
    assert "AssertionError" in found[1].said
    assert "SyntaxError" in found[3].said


def test_an_endless_loop_is_stopped(sandbox):
    begun = time.monotonic()
    assert run_program("while True: pass", Limits(seconds=1)) == ("timeout", "stopped after 1 s")
    assert time.monotonic() - begun < 30


def count_marked(mark: str) -> int:
    """The processes whose command line or folder bears a mark."""
    found = 0
    for place in Path("/proc").glob("[0-9]*"):
        try:
            found += mark in (place / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
    return found


@pytest.mark.parametrize("leave", ["", "if os.getpid() > 1: os.setsid()"])
def test_a_fork_bomb_is_limited_and_killed_with_all_its_children(sandbox, leave, monkeypatch):
    monkeypatch.setattr(execution.secrets, "token_hex", lambda size: f"bomb{os.getpid()}")
    program = (
        f"import os, time\nfor _ in range(4):\n    try: os.fork()\n    except OSError: pass\n{leave}\ntime.sleep(1000)"
    )
    assert run_program(program, Limits(seconds=2)).status == "timeout"
    assert count_marked(f"bomb{os.getpid()}") == 0
    bomb = "import os\nwhile True: os.fork()"
    assert run_program(bomb, Limits(seconds=3)).status in ("failed", "timeout")
    assert count_marked("program.py") == 0


def test_ten_gigabytes(sandbox):
    fails("x = bytearray(10**10)", "MemoryError")
    fails("open('a', 'wb').write(bytes(10**8))", "File too large")
    fails("for n in range(100): open(str(n), 'wb').write(bytes(10**6))", "", Limits(files=2**23))


def test_writes_outside_of_its_folder(sandbox, tmp_path):
    target = tmp_path / "mine"
    target.write_text("kept")
    for act in (f"open({str(target)!r}, 'w')", f"open({str(tmp_path / 'new')!r}, 'w')", "open('/dev/shm/x', 'w')"):
        fails(act, "Read-only file system")
    fails(f"import os; os.remove({str(target)!r})", "Read-only file system")
    remount = "import ctypes; assert ctypes.CDLL(None).mount(b'none', b'/', None, 32 | 4096, None) == 0"
    fails(remount, "AssertionError")
    assert target.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [target]
    assert run_program("open('a', 'w').write('b'); assert open('a').read() == 'b'").status == "passed"


def test_the_network(sandbox):
    fails("import socket; socket.create_connection(('127.0.0.1', 22), 2)", "Network is unreachable")
    fails("import socket; socket.create_connection(('192.0.2.1', 80), 2)", "Network is unreachable")


def test_standard_input_and_the_environment_are_empty(sandbox, monkeypatch):
    monkeypatch.setenv("SECRET", "hidden")
    fails("input()", "EOFError")
    assert run_program("import os; assert 'SECRET' not in os.environ").status == "passed"
    assert run_program("import glob; assert len(glob.glob('/proc/[0-9]*')) == 1").status == "passed"


def test_the_parent_cannot_be_killed(sandbox):
    for victim in ("os.getppid()", "0", "-1", str(os.getpid())):
        outcome = run_program(f"import os, signal\nos.kill({victim}, signal.SIGKILL)\nraise SystemExit(1)", SHORT)
        assert outcome.status == "failed"


def test_where_programs_cannot_be_isolated_none_is_run(sandbox, tmp_path, monkeypatch):
    said = 'print(\'{"refused": "unshare: Operation not permitted"}\')'
    (tmp_path / "sandbox.py").write_text(said)
    monkeypatch.setattr(execution, "SANDBOX", tmp_path / "sandbox.py")
    with pytest.raises(
        InputError, match=r"cannot isolate programs .unshare: Operation not permitted.; nothing was run"
    ):
        run_program("")
    (tmp_path / "sandbox.py").write_text("raise SystemExit('broken')")
    with pytest.raises(InputError, match=r"cannot isolate programs .broken"):
        run_program("")
    monkeypatch.setattr(execution.sys, "platform", "darwin")
    with pytest.raises(InputError, match=r"programs are not run on darwin\. Isolation needs Linux"):
        run_program("")


def test_a_sandbox_that_hangs_is_killed(tmp_path, monkeypatch):
    (tmp_path / "sandbox.py").write_text("import time; time.sleep(1000)")
    monkeypatch.setattr(execution, "SANDBOX", tmp_path / "sandbox.py")
    monkeypatch.setattr(execution, "PATIENCE", 0)
    assert run_program("", Limits(seconds=1)) == ("timeout", "the sandbox did not end 0 s later")
    assert count_marked(str(tmp_path)) == 0


@pytest.mark.parametrize(("n", "c", "k"), [(1, 1, 1), (1, 0, 1), (5, 2, 3), (6, 1, 6), (7, 3, 1), (6, 0, 2), (4, 4, 2)])
def test_pass_at_k_is_the_mean_over_all_choices_of_k_answers(n, c, k):
    right = [True] * c + [False] * (n - c)
    choices = list(itertools.combinations(right, k))
    assert pass_at_k([(n, c)], k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_k_of_several_tasks():
    trials = count_trials([True, False, False, True, True], ["a", "a", "b", None, None])
    assert trials == [(2, 1), (1, 0), (1, 1), (1, 1)]
    assert pass_at_k(trials, 1) == pytest.approx((0.5 + 0 + 1 + 1) / 4)
    assert pass_at_k(trials, 2) is None
    assert pass_at_k([(200, 1), (200, 200)], 100) == pytest.approx(0.75)
    for wrong in (([], 1), ([(1, 1)], 0)):
        with pytest.raises(InputError, match="must be at least 1"):
            pass_at_k(*wrong)
