"""Which processes a training joins."""

import pytest

from minipeft.errors import InputError
from minipeft.training.launch import join
from minipeft.training.processes import Alone, ParallelConfig


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


def test_a_flag_for_several_processes_is_refused_for_one() -> None:
    with (
        pytest.raises(InputError, match="shard: has no effect on a process that trains alone"),
        join(ParallelConfig(shard=True)),
    ):
        pass
