"""Time and peak memory of packing many examples, whose ids are drawn at random.

python benchmarks/packing.py [--examples 1000000]
"""

import argparse
import random
import resource
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from minipeft.data.encoded import Example, as_arrays
from minipeft.data.packing import pack

TOKENIZER: Any = SimpleNamespace(pad=0, eos=1, size=50_000, require_eos=lambda: 1)


def draw(count: int) -> Iterator[Example]:
    """So many examples of 110 tokens on average, the first 20 of them the prompt."""
    numbers = random.Random(0)
    pool = [numbers.randrange(2, 40_000) for _ in range(10**5)]
    for _ in range(count):
        start = numbers.randrange(0, len(pool) - 200)
        yield Example([*pool[start : start + numbers.randrange(60, 159)], 1], 20)


def peak() -> float:
    """The most memory that this process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1_000_000)
    count = parser.parse_args().examples
    print(f"imports: {peak():.2f} GB")
    encoded = as_arrays(draw(count))
    print(f"{count:,} examples, {len(encoded.ids):,} tokens in arrays: {peak():.2f} GB")
    for loss_mask in ("all", "response"):
        start = time.perf_counter()
        batches = pack(encoded, TOKENIZER, length=1024, batch=4, loss_mask=loss_mask)
        seconds = time.perf_counter() - start
        print(f"packed, loss on {loss_mask}: {seconds:.1f} s, {peak():.2f} GB, {len(batches):,} batches")


if __name__ == "__main__":
    main()
