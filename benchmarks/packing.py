"""Time and peak memory of packing many examples: of ids drawn at random, or of a data file.

python benchmarks/packing.py [--examples 1000000]     arrays of ids -> rows
python benchmarks/packing.py --file [--examples N]    a file of texts -> tokens -> rows: in memory, then with a token
                                                      file, which the first process writes and the second maps
"""

import argparse
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from minipeft.data.encoded import Example, as_arrays
from minipeft.data.examples import load_pairs
from minipeft.data.forms import open_data
from minipeft.data.packing import pack
from minipeft.data.streaming import encode_stream
from minipeft.data.token_file import load_encoded
from minipeft.data.tokens import load_tokenizer

TOKENIZER: Any = SimpleNamespace(pad=0, eos=1, size=50_000, require_eos=lambda: 1)


def draw(count: int) -> Iterator[Example]:
    """So many examples of 110 tokens on average, the first 20 of them the prompt."""
    numbers = random.Random(0)
    pool = [numbers.randrange(2, 40_000) for _ in range(10**5)]
    for _ in range(count):
        start = numbers.randrange(0, len(pool) - 200)
        yield Example([*pool[start : start + numbers.randrange(60, 159)], 1], 20)


def write_texts(file: Path, count: int) -> None:
    """Write prompts of one demo intent with completions of several snippets, 110 of the demo's tokens on average."""
    pairs, numbers = load_pairs("demo").items, random.Random(0)
    with file.open("w") as stream:
        for n in range(count):
            snippets = [numbers.choice(pairs).snippet for _ in range(numbers.randrange(3, 10))]
            row = {"prompt": f"{n}: {numbers.choice(pairs).intent}\n", "completion": "\n".join(snippets)}
            stream.write(json.dumps(row) + "\n")


def peak() -> float:
    """The most memory that this process has held, in GB; pages of a mapped file that it has read count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def pack_file(file: Path, cache: Path | None) -> str:
    """Read, encode, split and pack a file as a training run does; returns the figures."""
    begin, before = time.perf_counter(), peak()
    tokenizer = load_tokenizer("demo")
    stream = open_data(file)
    data = encode_stream(stream, tokenizer) if cache is None else load_encoded(stream, tokenizer, cache)
    encoded = time.perf_counter()
    kept, _, _ = data.hold_out(100)
    batches = pack(kept, tokenizer, length=1024, batch=4, loss_mask="response")
    packed = time.perf_counter()
    tokens = batches.report.tokens_in
    return (f"{tokens:,} tokens in {encoded - begin:.1f} s, split and packed in {packed - encoded:.1f} s, "
            f"{len(batches):,} batches; {peak():.2f} GB, {before:.2f} of them imports")  # fmt: skip


def measure_file(count: int) -> None:
    """Measure a file of texts, each way in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file, cache = Path(folder, "rows.jsonl"), Path(folder, "cache")
        write_texts(file, count)
        print(f"{count:,} rows, {file.stat().st_size / 1e6:,.0f} MB; load average {os.getloadavg()[0]:.1f}", flush=True)
        for name, given in (("in memory", None), ("token file written", cache), ("token file mapped", cache)):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                print(f"{name}: {process.submit(pack_file, file, given).result()}", flush=True)


def measure_arrays(count: int) -> None:
    """Measure packing alone."""
    print(f"imports: {peak():.2f} GB")
    encoded = as_arrays(draw(count))
    print(f"{count:,} examples, {len(encoded.ids):,} tokens in arrays: {peak():.2f} GB")
    for loss_mask in ("all", "response"):
        start = time.perf_counter()
        batches = pack(encoded, TOKENIZER, length=1024, batch=4, loss_mask=loss_mask)
        seconds = time.perf_counter() - start
        print(f"packed, loss on {loss_mask}: {seconds:.1f} s, {peak():.2f} GB, {len(batches):,} batches")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--file", action="store_true", help="from a file of texts")
    given = parser.parse_args()
    (measure_file if given.file else measure_arrays)(given.examples)


if __name__ == "__main__":
    main()
