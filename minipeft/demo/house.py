"""The house library of the demo's task: a table of rows in a hundred lines, in words that no base model has read.

    orders.where(status='open').by('price', down=True).head(3)

It is here so that an answer can be run: two ways to write the same then count as the same (tests/demo/test_house.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Table:
    """Rows of named values; each method returns a new table, a number, or a row, and changes nothing."""

    def __init__(self, rows: Iterable[Row]):
        self.rows = [dict(row) for row in rows]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table) and self.rows == other.rows

    __hash__ = None  # type: ignore[assignment]

    def where(self, **wanted: Any) -> Table:
        """The rows with these values."""
        return Table(row for row in self.rows if all(row[c] == v for c, v in wanted.items()))

    def unless(self, **refused: Any) -> Table:
        """The rows without these values."""
        return Table(row for row in self.rows if all(row[c] != v for c, v in refused.items()))

    def above(self, column: str, limit: float) -> Table:
        """The rows with more than `limit`."""
        return Table(row for row in self.rows if row[column] is not None and row[column] > limit)

    def below(self, column: str, limit: float) -> Table:
        """The rows with less than `limit`."""
        return Table(row for row in self.rows if row[column] is not None and row[column] < limit)

    def by(self, column: str, down: bool = False) -> Table:
        """Sorted by a column, missing values last."""
        known = [row for row in self.rows if row[column] is not None]
        return Table(
            [*sorted(known, key=lambda row: row[column], reverse=down), *(r for r in self.rows if r[column] is None)]
        )

    def head(self, count: int) -> Table:
        """The first rows."""
        return Table(self.rows[:count])

    def tail(self, count: int) -> Table:
        """The last rows."""
        return Table(self.rows[-count:])

    def every(self, step: int) -> Table:
        """One row in `step`."""
        return Table(self.rows[::step])

    def flip(self) -> Table:
        """In reverse order."""
        return Table(self.rows[::-1])

    def size(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def values(self, column: str) -> list[Any]:
        """What a column holds, missing values left out."""
        return [row[column] for row in self.rows if row[column] is not None]

    def total(self, column: str) -> float:
        """The sum of a column."""
        return sum(self.values(column))

    def mean(self, column: str) -> float:
        """The average of a column; 0 where it holds nothing."""
        return self.total(column) / max(1, len(self.values(column)))

    def kinds(self, column: str) -> list[Any]:
        """Each value of a column once, in order of appearance."""
        return list(dict.fromkeys(self.values(column)))

    def peak(self, column: str) -> Row | None:
        """The row with the largest value."""
        return max((r for r in self.rows if r[column] is not None), key=lambda row: row[column], default=None)

    def dip(self, column: str) -> Row | None:
        """The row with the smallest value."""
        return min((r for r in self.rows if r[column] is not None), key=lambda row: row[column], default=None)

    def only(self, *columns: str) -> Table:
        """These columns."""
        return Table({c: row[c] for c in columns} for row in self.rows)

    def without(self, *columns: str) -> Table:
        """All but these columns."""
        return Table({c: v for c, v in row.items() if c not in columns} for row in self.rows)

    def rename(self, **names: str) -> Table:
        """Columns under other names: old='new'."""
        return Table({names.get(c, c): v for c, v in row.items()} for row in self.rows)

    def _changed(self, values: dict[str, Any], change: Callable[[Any, Any], Any]) -> Table:
        return Table({c: change(v, values[c]) if c in values else v for c, v in row.items()} for row in self.rows)

    def fill(self, **values: Any) -> Table:
        """These values where a column has none."""
        return self._changed(values, lambda old, new: new if old is None else old)

    def shift(self, **values: float) -> Table:
        """Columns with a number added."""
        return self._changed(values, lambda old, new: None if old is None else old + new)

    def scale(self, **values: float) -> Table:
        """Columns times a number."""
        return self._changed(values, lambda old, new: None if old is None else old * new)

    def per(self, column: str) -> Groups:
        """A table for each value of a column."""
        return Groups({kind: self.where(**{column: kind}) for kind in self.kinds(column)})

    def meet(self, other: Table, on: str) -> Table:
        """Each pair of rows with the same value in a column, as one row."""
        return Table({**mine, **theirs} for mine in self.rows for theirs in other.rows if mine[on] == theirs[on])

    def stack(self, other: Table) -> Table:
        """The rows of both."""
        return Table([*self.rows, *other.rows])

    def save(self, file: str) -> None:
        """Write the rows to a file, a line of JSON each."""
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")


class Groups:
    """A table for each value of a column; a method of Table answers for each, by value."""

    def __init__(self, tables: dict[Any, Table]):
        self.tables = tables

    def __getattr__(self, name: str) -> Callable[..., dict[Any, Any]]:
        if name.startswith("_") or not hasattr(Table, name):
            raise AttributeError(name)
        return lambda *given: {kind: getattr(table, name)(*given) for kind, table in self.tables.items()}
