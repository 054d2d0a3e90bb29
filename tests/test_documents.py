"""Who sees whom against a literal definition, on random rows, whole and through a cache; the derived seeds."""

import inspect
from itertools import pairwise

import torch
import torch.nn.functional as F

from minipeft import documents as essay
from minipeft.documents import PADDING, VIRTUAL, derive_seed, positions_in, visible
from minipeft.models.cache import Cache
from minipeft.models.layout import lay_out


def random_row(generator: torch.Generator, length: int) -> list[int]:
    """Owners of a row: runs of documents in any order of numbers, some twice, with padding anywhere between."""
    row: list[int] = []
    while len(row) < length:
        owner = int(torch.randint(-1, 4, (), generator=generator))
        row += [owner] * int(torch.randint(1, 7, (), generator=generator))
    return row[:length]


def literal_positions(row: list[int]) -> list[int]:
    """Each column's position, straight from the definition."""
    found = []
    for column, owner in enumerate(row):
        start = column
        while start > 0 and row[start - 1] == owner:
            start -= 1
        place = column - start
        found.append(0 if owner == PADDING else place if owner == VIRTUAL else place + row.count(VIRTUAL))
    return found


def literal_mask(row: list[int], queries: int, window: int | None, windowed: bool) -> list[list[bool]]:
    """Who sees whom, straight from the definition."""
    positions = literal_positions(row)
    table = []
    for q in range(len(row) - queries, len(row)):
        line = []
        for k, owner in enumerate(row):
            near = window is None or positions[q] - positions[k] < window
            shared = owner == VIRTUAL and (near or not windowed)
            line.append(k <= q and ((owner == row[q] and near) or shared))
        table.append(line)
    return table


def draw(generator: torch.Generator, most: int) -> int:
    return int(torch.randint(0, most + 1, (), generator=generator))


def test_the_rule_on_300_random_rows():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        virtual_tokens, length = draw(generator, 4), 1 + draw(generator, 20)
        row = [VIRTUAL] * virtual_tokens + random_row(generator, length)
        window = draw(generator, 8) or None
        windowed, prompted = bool(draw(generator, 1)), bool(draw(generator, 1))
        queries = length + (virtual_tokens if prompted else 0)
        documents = torch.tensor([row])
        positions = positions_in(documents)
        assert positions[0].tolist() == literal_positions(row)
        mask = visible(documents, positions, queries, window, windowed)
        assert mask.shape == (1, 1, queries, virtual_tokens + length)
        assert mask[0, 0].tolist() == literal_mask(row, queries, window, windowed)


def test_the_rule_through_a_cache_on_random_rows():
    """lay_out in two calls, as prefill and decode make them: each gives the definition's rows for its own queries."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        virtual_tokens, first, second = draw(generator, 3), 1 + draw(generator, 9), 1 + draw(generator, 4)
        own = random_row(generator, first + second)
        window, windowed, prompted = draw(generator, 6) or None, bool(draw(generator, 1)), bool(draw(generator, 1))
        cache = Cache(1, 1, 1, virtual_tokens + first + second, 2, torch.float32, torch.device("cpu"))
        given = {"virtual_tokens": virtual_tokens, "prompted": prompted, "windows": (window,), "windowed": windowed}
        for start, stop in pairwise((0, first, first + second)):
            documents = torch.tensor([own[start:stop]])
            layout = lay_out(documents, torch.zeros_like(documents), cache, **given)
            row = [VIRTUAL] * virtual_tokens + own[:stop]
            queries = stop - start + (virtual_tokens if prompted and start == 0 else 0)
            assert layout.positions[0].tolist() == literal_positions(row)[-queries:]
            assert layout.views[window].mask[0, 0].tolist() == literal_mask(row, queries, window, windowed)
            assert layout.first == (start == 0)


def test_the_rows_drawn_in_the_essay_are_the_rule():
    """The drawing in documents.py, cell by cell."""
    lines = [line for line in essay.__doc__.splitlines() if line.rstrip().endswith(("#", "no softmax is empty)"))]
    drawn = [[mark == "#" for mark in line.split("(")[0].ljust(70)[51:67:2]] for line in lines]
    row = [VIRTUAL] * 2 + [0, 0, 0, 1, 1, PADDING]
    assert drawn == literal_mask(row, 6, None, False)


def test_derived_seeds_differ() -> None:
    parts = [(), (0,), (1,), ("0",), (0, 1), (1, 0), (0, "1"), ("order", 0, 0), ("order", 0, 1)]
    assert len({derive_seed(*p) for p in parts}) == len(parts)
    assert all(0 <= derive_seed(i) < 2**63 for i in range(100))


def test_the_ignored_label_is_torchs():
    assert inspect.signature(F.cross_entropy).parameters["ignore_index"].default == essay.IGNORED
