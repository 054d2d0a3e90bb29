"""How micro-batches are shared, and sums in order."""

from pathlib import Path

import pytest

from minipeft.errors import InputError
from minipeft.training.processes import Alone, check_accumulation, sum_in_order
from tests.ranks import refused


def test_more_processes_than_micro_batches_are_refused(place: Path, tmp_path: Path) -> None:
    first, _ = refused(place, tmp_path, accumulate=1)
    assert first == (
        "accumulate: 1 micro-batches a step leave 1 of 2 processes without any. "
        "Give --accumulate 2 with a smaller --batch, or start 1 processes\n"
    )
    assert not (tmp_path / "run").exists()


def test_the_sum_in_order_is_that_of_a_loop() -> None:
    values = [1.0, 1e100, 1.0, -1e100]
    assert sum_in_order(values) == 0.0
    assert sum_in_order([]) == 0.0


def test_a_process_alone_shares_nothing() -> None:
    alone = Alone()
    assert alone.compute(3, lambda i: 2.0 * i) == [0.0, 2.0, 4.0]
    assert alone.lead(lambda: 5) == alone.agree(5) == 5
    assert alone.exchange("a") == ["a"]
    check_accumulation(1, alone)


def test_train_takes_processes_or_nothing() -> None:
    from minipeft.training.processes import check_processes

    assert isinstance(check_processes(None), Alone)
    with pytest.raises(InputError, match=r"processes: 3 must be a Processes"):
        check_processes(3)  # type: ignore[arg-type]
