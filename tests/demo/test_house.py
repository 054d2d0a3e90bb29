"""The house library of the demo's task against plain Python on a small table."""

import json

import pytest

from minipeft.demo.house import Table

ROWS = [
    {"city": "oslo", "price": 3, "size": 1},
    {"city": "rome", "price": 9, "size": None},
    {"city": "oslo", "price": 5, "size": 4},
    {"city": "kyoto", "price": 1, "size": 2},
]
T = Table(ROWS)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (T.where(city="oslo"), [ROWS[0], ROWS[2]]),
        (T.unless(city="oslo"), [ROWS[1], ROWS[3]]),
        (T.above("price", 3), [ROWS[1], ROWS[2]]),
        (T.below("size", 4), [ROWS[0], ROWS[3]]),
        (T.by("price"), [ROWS[3], ROWS[0], ROWS[2], ROWS[1]]),
        (T.by("size", down=True), [ROWS[2], ROWS[3], ROWS[0], ROWS[1]]),
        (T.head(2), ROWS[:2]),
        (T.tail(2), ROWS[2:]),
        (T.every(2), [ROWS[0], ROWS[2]]),
        (T.flip(), ROWS[::-1]),
        (T.only("city"), [{"city": row["city"]} for row in ROWS]),
        (T.without("city", "size"), [{"price": row["price"]} for row in ROWS]),
        (T.rename(price="cost").only("cost"), [{"cost": row["price"]} for row in ROWS]),
        (T.fill(size=7).only("size"), [{"size": n} for n in (1, 7, 4, 2)]),
        (T.shift(size=2).only("size"), [{"size": n} for n in (3, None, 6, 4)]),
        (T.scale(price=2).only("price"), [{"price": n} for n in (6, 18, 10, 2)]),
        (T.meet(Table([{"city": "rome", "land": "it"}]), on="city"), [{**ROWS[1], "land": "it"}]),
        (T.head(1).stack(T.tail(1)), [ROWS[0], ROWS[3]]),
    ],
)
def test_a_method_that_gives_a_table(found, wanted):
    assert found == Table(wanted)
    assert T.rows == ROWS


def test_a_method_that_gives_something_else():
    assert T.size() == 4
    assert T.total("price") == 18
    assert T.mean("size") == pytest.approx(7 / 3)
    assert T.kinds("city") == ["oslo", "rome", "kyoto"]
    assert (T.peak("price"), T.dip("price")) == (ROWS[1], ROWS[3])
    assert Table([]).peak("price") is None
    assert T.per("city").size() == {"oslo": 2, "rome": 1, "kyoto": 1}
    assert T.per("city").total("price") == {"oslo": 8, "rome": 9, "kyoto": 1}
    with pytest.raises(AttributeError):
        T.per("city").nothing()


def test_it_saves_a_line_a_row(tmp_path):
    T.save(str(tmp_path / "t.jsonl"))
    assert [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()] == ROWS
