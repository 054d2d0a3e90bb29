"""The cost of bits that do not depend on the batch: training and decoding with and without --batch-invariant.

    python benchmarks/batch_invariant.py --model FOLDER --out benchmarks/results/batch-invariant-cpu.json

A step: LoRA r16 on all linears, one row of 512 tokens that holds documents of 24 to 64 random tokens. Decoding: 8 or 25
prompts of 20 to 60 random tokens, greedy, 32 tokens each, with and without packed weights.
"""

import argparse
from collections.abc import Callable
from functools import partial

import measure
import torch

import minipeft
from minipeft.data.packing import Batch
from minipeft.decoding import ROWS
from minipeft.generation import decode
from minipeft.models.packed import PackedModel
from minipeft.training.loop import TrainConfig, train

ROW, NEW = 512, 32


def make_row() -> Batch:
    """A row of documents of 24 to 64 tokens, the last one cut where the row ends."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1000, (1, ROW), generator=draw)
    labels, documents, column, number = ids.clone(), torch.zeros_like(ids), 0, 0
    while column < ROW:
        labels[0, column] = -100
        documents[0, column:] = number
        column, number = column + int(torch.randint(24, 65, (), generator=draw)), number + 1
    return Batch(ids, labels, documents)


def make_steps(source: str, invariant: bool) -> Callable[[], object]:
    """A function that takes one training step."""
    model = minipeft.load_model(source, dtype=torch.float32)
    minipeft.add_adapter(model, minipeft.LoRAConfig(16, 32))
    row = make_row()
    steps = train(model, [row] * 10_000, TrainConfig(steps=10_000, batch_invariant=invariant))
    return lambda: next(steps)


def make_decoding(source: str, prompts: int, packed: bool) -> dict[str, Callable[[], object]]:
    """Functions that answer the prompts, in batches of 25 padded together, or eight at a time."""
    model, tokenizer = minipeft.load_model(source, dtype=torch.float32), minipeft.load_tokenizer(source)
    draw = torch.Generator().manual_seed(prompts)
    lengths = torch.randint(20, 61, (prompts,), generator=draw).sort().values.tolist()
    rows = [torch.randint(0, 1000, (n,), generator=draw).tolist() for n in lengths]
    held = PackedModel(model, empty=not packed)

    def run(invariant: bool) -> list[list[int]]:
        config = minipeft.GenerateConfig(max_new_tokens=NEW, temperature=0, batch_invariant=invariant)
        size, made = ROWS if invariant else 25, []
        with held.used():
            for first in range(0, prompts, size):
                part = rows[first : first + size]
                made += decode(model, tokenizer, list(range(len(part))), part, config, ())[0]
        return made

    assert run(False) == run(True)
    return {"plain": partial(run, False), "batch-invariant": partial(run, True)}


def main() -> None:
    """Measure both and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser, rounds=5)
    parser.add_argument("--model", required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shared = {"dtype": "float32", "rounds": options.rounds, "calls": 1, "warmups": 1, "busy": options.busy}
    names = {"plain": False, "batch-invariant": True}
    steps = {name: make_steps(options.model, invariant) for name, invariant in names.items()}
    documents = int(make_row().documents.max()) + 1
    shape = f"1 x {ROW}, {documents} documents"
    rows = measure.measure(steps, name="batch-invariant step", shape=shape, **shared)
    for prompts in (8, 25):
        for packed in (False, True):
            rows += measure.measure(
                make_decoding(options.model, prompts, packed),
                name="batch-invariant decoding",
                shape=f"{prompts} x {NEW}" + (", packed weights" if packed else ""),
                note="equal ids",
                **shared,
            )
    measure.show_rows(rows)
    if options.out:
        measure.write_rows(options.out, rows)


if __name__ == "__main__":
    main()
