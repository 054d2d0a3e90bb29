"""The forecast of the remaining time, replayed on the recorded times of a study's cells."""

from collections.abc import Iterator

import pytest

from minipeft.study.drafts import Base, make_cells
from minipeft.study.presets import StudyConfig
from minipeft.study.progress import Forecast, count_lines, estimate_work

QUESTIONS = 168
DEMO = Base("demo", 4_339_200, "gpt2", 190, 512)
# Seconds of each cell of `minipeft study`: before its first step (or answer), training, answering, after. The first on
# one thread of a machine at work; of the second the training times are those of results/demo.
BUSY = {"zero-shot": (4, 0, 6, 3), "full": (4, 261, 10, 4), "lora": (12, 202, 12, 3), "prefix": (10, 285, 17, 5),
        "prompt": (17, 222, 13, 3)}  # fmt: skip
QUIET = {"zero-shot": (3, 0, 6, 1), "full": (3, 143, 7, 1), "lora": (3, 91, 7, 1), "prefix": (3, 86, 7, 1),
         "prompt": (3, 57, 7, 1)}  # fmt: skip


def replay(times: dict[str, tuple[float, ...]], names: dict[str, str], parts: dict[str, tuple[float, float]],
           forecast: Forecast) -> Iterator[tuple[float, float | None]]:  # fmt: skip
    """(seconds since the start, seconds left as forecast), every second."""
    begun = 0.0
    for method, (before, training, answering, after) in times.items():
        name, work = names[method], parts[method]
        forecast.begin(name, begun)
        for second in range(int(before + training + answering + after)):
            trained = min(1.0, max(0.0, second - before) / training) if training else 1.0
            answered = min(1.0, max(0.0, second - before - training) / answering)
            forecast.advance(name, (work[0] * trained + work[1] * answered) / sum(work), begun + second)
            yield begun + second, forecast.seconds_left(begun + second)
        begun += before + training + answering + after
        forecast.finish(name, begun)


@pytest.mark.parametrize("times", [BUSY, QUIET], ids=["busy", "quiet"])
def test_the_time_left_is_right_within_half_of_it_from_a_tenth_on(times):
    cells = {cell.method: cell for cell in make_cells(StudyConfig(), {"demo": DEMO}, 100)}
    parts = {method: estimate_work(cell, DEMO, QUESTIONS) for method, cell in cells.items()}
    names = {method: cell.name for method, cell in cells.items()}
    forecast = Forecast({names[method]: sum(work) for method, work in parts.items()}, ())
    total = sum(map(sum, times.values()))
    for now, left in replay(times, names, parts, forecast):
        if now >= total / 10:
            true = total - now
            assert left is not None
            assert true / 1.5 < left < 1.5 * true or abs(left - true) < 5, (now, left, true)


def test_what_was_done_before_took_no_time_now():
    """A study that is resumed with one cell finished and one half done."""
    forecast = Forecast({"a": 10.0, "b": 10.0, "c": 10.0}, ("a",))
    forecast.begin("b", 100.0)
    assert forecast.advance("b", 0.5, 100.0) == 15.0
    assert forecast.seconds_left(101.0) is None
    assert forecast.advance("b", 0.75, 103.0) == 17.5
    assert forecast.seconds_left(105.0) == pytest.approx(5.0 + 20.0)  # 2.5 of work took 5 seconds; 12.5 are left
    assert forecast.finish("b", 109.0) == 20.0
    assert forecast.seconds_left(110.0) == pytest.approx(10.0 * 9 / 2.5)


def test_a_cell_that_fails_is_over():
    forecast = Forecast({"a": 10.0, "b": 10.0}, ())
    forecast.begin("a", 0.0)
    for share in (0.0, 0.2):
        forecast.advance("a", share, 10 * share)
    assert forecast.finish("a", 4.0) == 10.0
    assert forecast.seconds_left(5.0) == pytest.approx(20.0)  # 2 of work took 4 seconds


def test_work_is_counted_in_tokens():
    lora, full = (make_cells(StudyConfig(method=(m,)), {"demo": DEMO}, 100)[1] for m in ("lora", "full"))
    assert estimate_work(lora, DEMO, 10) == (380 * 512 * 2 * 4_339_200, 2.0 * 10 * (30 + 40) * 4_339_200)
    assert estimate_work(full, DEMO, 10)[0] == 1.5 * estimate_work(lora, DEMO, 10)[0]
    assert estimate_work(lora, None, 10) == (0.0, 0.0)


def test_two_workers_halve_the_time_left():
    """Two equal cells that ran at once and two that wait: what is left takes half of what one worker needs."""
    work = dict.fromkeys("abcd", 10.0)
    one, two = Forecast(work, (), 1), Forecast(work, (), 2)
    for forecast in (one, two):
        for cell in "ab":
            forecast.begin(cell, 0.0)
            forecast.advance(cell, 0.0, 0.0)
        assert forecast.advance("a", 0.5, 4.0) + forecast.advance("b", 0.5, 4.0) == 5.0 + 10.0
    assert one.seconds_left(4.0) == pytest.approx(30 * 0.8)
    assert two.seconds_left(4.0) == pytest.approx(15 * 0.8)
    assert two.finish("a", 8.0) == 15.0
    for cell in "bc":
        two.finish(cell, 8.0)
    assert two.seconds_left(8.0) == pytest.approx(10 * 1.6), "a single cell has one worker"


def test_a_file_that_is_renamed_while_it_is_counted_has_no_lines(tmp_path, monkeypatch):
    """A cell renames its answers when they are complete; a study on a busy machine ended there."""
    monkeypatch.setattr("pathlib.Path.exists", lambda path: True)
    assert count_lines(tmp_path / "predictions.jsonl.part") == 0
