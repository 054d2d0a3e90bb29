"""The numbers of the stops on training: the loss in chunks, one step, dropout as a hash, saving."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch
import torch.nn.functional as F

from minipeft.adapters import LoRAConfig, add_adapter
from minipeft.adapters.lora import make_dropout, make_keep_mask
from minipeft.documents import IGNORED
from minipeft.errors import InputError
from minipeft.files import write_whole
from minipeft.models import Decoder
from minipeft.models.loss import CHUNK_LOGITS
from minipeft.tour.bench import Bench
from minipeft.tour.values import Drawing, Output, Table, Value, claim
from minipeft.training.loop import Step, TrainConfig, TrainState, learning_rate_at, train, trained


def measure_loss(bench: Bench) -> Mapping[str, Value]:
    """The size of the logits, and the loss in chunks beside torch's."""
    model = bench.model()
    batch = bench.pack(bench.pairs[:24])[0]
    hidden = model.hidden(batch.ids, batch.documents).detach()  # [B, T, C]
    logits = model.logits(hidden)[:, :-1].flatten(0, 1)  # [B (T - 1), V]
    whole = F.cross_entropy(logits, batch.labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum").item()
    chunked = model.loss(batch.ids, batch.labels, batch.documents).item()
    claim(abs(whole - chunked) < 1e-3 * whole, "the loss in chunks is the loss")
    vocabulary, tokens = 50257, 1024
    return {
        "tokens": tokens,
        "vocabulary": vocabulary,
        "megabytes": 4 * tokens * vocabulary / 1e6,
        "chunk_megabytes": 4 * CHUNK_LOGITS / 1e6,
        "chunk_tokens": CHUNK_LOGITS // vocabulary,
        "whole": whole,
        "difference": abs(whole - chunked),
    }


def measure_step(bench: Bench) -> Mapping[str, Value]:
    """Some steps, the same with a stop in between, and the learning-rate schedule."""
    config = TrainConfig(steps=6 if bench.quick else 12, learning_rate=3e-3)
    batches = bench.pack(bench.pairs[:60], length=bench.length)
    make = lambda: (model := bench.model(), add_adapter(model, LoRAConfig(rank=8, dropout=0.1)))[0]
    straight = make()
    steps = list(train(straight, batches, config))
    first, state = make(), None
    half = config.steps // 2 if config.steps else 0
    state = TrainState(first)
    for step in train(first, batches, config, state):
        if step.number == half:
            break
    second, kept = make(), copy_state(first, state)
    for name, p in trained(second).items():
        p.data.copy_(trained(first)[name].data)
    rest = list(train(second, batches, config, kept))
    equal = all(torch.equal(p, trained(straight)[name]) for name, p in trained(second).items())
    claim(
        equal and [s.loss for s in rest] == [s.loss for s in steps[half:]],
        "a training that stops and goes on is the same",
    )
    schedule = TrainConfig(steps=100, learning_rate=1.0)
    rates = [(step + 1, learning_rate_at(step, schedule)) for step in range(100)]
    peak = max(rates, key=lambda pair: pair[1])
    words = f"The learning rate rises to its peak at step {peak[0]} of {schedule.steps} and falls to zero."
    return {
        "steps": len(steps),
        "half": half,
        "tensors": len(trained(straight)),
        "output": Output("\n".join(format_step(step) for step in steps[:4])),
        "warmup": 100 * schedule.warmup,
        "first": steps[0].loss,
        "last": steps[-1].loss,
        "plot": Drawing(draw_rates(rates), words),
    }


def format_step(step: Step) -> str:
    """A step as the loop's caller might print it."""
    return f"step {step.number}  loss {step.loss:.3f}  lr {step.learning_rate:.2e}  grad_norm {step.grad_norm:.3f}"


def copy_state(model: Decoder, state: TrainState) -> TrainState:
    """A copy of the training state, as a checkpoint would hold it."""
    copy = TrainState(model)
    copy.step = state.step
    for mine, theirs in ((copy.exp_avg, state.exp_avg), (copy.exp_avg_sq, state.exp_avg_sq)):
        for name, moment in theirs.items():
            mine[name].copy_(moment)
    return copy


def draw_rates(rates: list[tuple[int, float]], height: int = 110) -> str:
    """Draw the learning rate over the steps, as a share of its peak."""
    points = " ".join(f"{step},{height * (1 - rate):.1f}" for step, rate in rates)
    return (
        f'<svg viewBox="0 -4 {len(rates)} {height + 8}" width="100%" height="{height}" preserveAspectRatio="none" '
        f'aria-hidden="true"><polyline points="{points}" class="curve s0" fill="none"/></svg>'
        "<p>The learning rate over the steps: a short linear rise, then a linear fall to zero.</p>"
    )


def measure_dropout(bench: Bench) -> Mapping[str, Value]:
    """The statistics of a mask that a hash computes."""
    drop = make_dropout(0.1, seed=7)
    assert drop is not None
    mask = make_keep_mask(drop, 512, 768)
    late = make_keep_mask(drop, 12, 768, first=500)
    claim(torch.equal(mask[500:], late), "any rows of the mask can be computed alone")
    other = make_dropout(0.1, seed=8)
    assert other is not None
    both = make_keep_mask(other, 512, 768)
    agree = (mask == both).float().mean().item()
    expected = drop.keep**2 + (1 - drop.keep) ** 2
    claim(abs(agree - expected) < 0.005, "two seeds give independent masks")
    return {
        "probability": 0.1,
        "keep": drop.keep,
        "kept": mask.float().mean().item(),
        "entries": mask.numel(),
        "agree": agree,
        "expected": expected,
        "bytes": mask.numel(),
        "drawn": draw_mask(mask[:12, :48]),
    }


def draw_mask(mask: torch.Tensor) -> Drawing:
    """Draw a corner of a mask: a filled cell is kept."""
    rows, columns = mask.shape
    cells = "".join(
        f'<rect x="{10 * c}" y="{10 * r}" width="9" height="9" class="{"d0" if mask[r, c] else "dp"}"/>'
        for r in range(rows) for c in range(columns)
    )  # fmt: skip
    words = (
        f"The first {rows} rows and {columns} columns of a mask: {int(mask.sum())} entries kept, the pale ones dropped."
    )
    svg = f'<svg viewBox="0 0 {10 * columns} {10 * rows}" style="width:100%" aria-hidden="true">{cells}</svg>'
    return Drawing(f"{svg}<p>{words}</p>", words)


def measure_saving(bench: Bench) -> Mapping[str, Value]:
    """A write that fails halfway, in place and whole."""
    old, new = b"old" * 1000, b"new" * 1000

    def fail_halfway(stream: IO[bytes]) -> None:
        stream.write(new[: len(new) // 2])
        raise OSError(28, "No space left on device")

    with tempfile.TemporaryDirectory() as folder:
        naive, whole = Path(folder, "naive.bin"), Path(folder, "whole.bin")
        for file in (naive, whole):
            file.write_bytes(old)
        try:
            with naive.open("wb") as stream:
                fail_halfway(stream)
        except OSError:
            pass
        said = ""
        try:
            write_whole(whole, fail_halfway)
        except InputError as error:
            said = str(error).replace(str(whole), whole.name)
        left = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    claim(left[whole.name] == old and len(left) == 2, "a failed write leaves the old file and nothing else")
    claim(len(left[naive.name]) == len(new) // 2, "a file that is rewritten in place is lost")
    rows = [("opened and rewritten", len(left[naive.name]), "half of the new file"),
            ("written whole", len(left[whole.name]), "the old file")]  # fmt: skip
    return {
        "size": len(old),
        "table": Table(("the file was", "bytes after the failure", "what it holds"), rows),
        "said": Output(said),
    }
