"""What each cell of a study will cost, before any weight is read: parameters, steps, memory, FLOPs, hours on a GPU.

A plan is made of the cell's own RunConfig, the one that its process trains with (drafts.py). Seeds cost the same, so a
method is planned once. Memory and FLOPs of a step are those of runs/planning.py; the hours of all seeds together are

    training    steps x FLOPs of a step / (UTILIZATION x peak FLOP/s)
    answers     questions / batch x new tokens x bytes of weights / (BANDWIDTH_USED x peak bandwidth)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

import torch

from minipeft.runs.config import RunConfig
from minipeft.runs.estimates import plan_step, read_base
from minipeft.runs.gpus import BANDWIDTH_USED, GPUS, UTILIZATION
from minipeft.runs.planning import adapt_on_meta, align, build_on_meta, count_bytes, format_seconds
from minipeft.study.cells import ZERO_SHOT, Cell
from minipeft.study.paper import explain_share, find_reported
from minipeft.study.table import name_method

HINT = "--activation-checkpointing, a smaller --batch, --quantize nf4 of a frozen base, or a larger GPU take less"


@dataclass(frozen=True)
class CellPlan:
    """The cost of a cell; memory in bytes. An untrained model has its weights alone."""

    model: str
    method: str
    variant: str
    seeds: int
    trainable: int  # parameters
    stored: int  # parameters on disk: without the reparameterization MLP
    total: int  # parameters of base and adapter, as stored
    steps: int
    rows: int  # of a step
    length: int  # tokens of a row, without virtual tokens
    dtype: str
    weights: int
    peak: int
    flops: float  # of training
    seconds: float | None = None  # of all seeds, on the GPU
    problem: str | None = None  # why it does not fit
    printed: float | None = None  # share of trainable parameters in the paper, in percent
    remark: str = ""  # ours beside it

    @property
    def percent(self) -> float:
        """Stored parameters in percent of base and adapter, as PEFT counts them."""
        return 100 * self.stored / self.total


def plan_cells(cells: Sequence[Cell], questions: int, gpu: str | None) -> list[CellPlan]:
    """Plan the cells whose model can be read; those that differ only by seed once.

    Raises:
        InputError: the adapter or the rows do not fit a model.
    """
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        if cell.run is not None:
            groups.setdefault(cell.key, []).append(cell)
    return [plan_cell(same, questions, gpu) for same in groups.values()]


def plan_cell(same: Sequence[Cell], questions: int, gpu: str | None) -> CellPlan:
    """Plan the cells of all seeds."""
    cell = same[0]
    assert cell.run is not None
    name = (cell.model, cell.method, cell.variant, len(same))
    planned = measure_untrained(cell.run, name) if cell.method == ZERO_SHOT else measure_trained(cell.run, name)
    if cell.method != ZERO_SHOT:
        printed = (find_reported(cell.run.model.source, cell.method) or {}).get("percent")
        remark = explain_share(cell.run.model.source, cell.method, planned.percent)
        planned = replace(planned, printed=printed, remark=remark)
    return planned if gpu is None else add_gpu(planned, same, questions, gpu)


def measure_untrained(run: RunConfig, name: tuple[str, str, str, int]) -> CellPlan:
    """The weights of the model alone."""
    base, dtype = read_base(run.model)
    model = build_on_meta(base).to(dtype)
    size, weights = sum(p.numel() for p in model.parameters()), count_bytes(list(model.parameters()))
    return CellPlan(*name, 0, 0, size, 0, 0, 0, str(dtype).removeprefix("torch."), weights, weights, 0.0)


def measure_trained(run: RunConfig, name: tuple[str, str, str, int]) -> CellPlan:
    """Parameters, and memory and FLOPs of training. A row holds its virtual tokens, as in pack."""
    base, _ = read_base(run.model)
    virtual = run.adapter.length if hasattr(run.adapter, "reparam") else 0  # a prefix or prompt
    packing = replace(run.packing, length=min(run.packing.length or 1024, base.context) - virtual)
    found = plan_step(run.model, run.adapter, packing, run.train)
    stored = found.trainable
    if getattr(run.adapter, "reparam", None) is not None:
        stored = adapt_on_meta(base, replace(run.adapter, reparam=None), torch.float32)[1].trainable
    total, steps, batches = found.total - found.trainable + stored, run.train.steps or 0, run.train.accumulate
    return CellPlan(
        *name, found.trainable, stored, total, steps, found.rows * batches, found.length, found.dtype,
        found.weights, found.peak, steps * batches * found.flops,
    )  # fmt: skip


def add_gpu(planned: CellPlan, same: Sequence[Cell], questions: int, name: str) -> CellPlan:
    """Add the time on a GPU, and why the cell does not fit it."""
    gpu, seconds = GPUS[name], 0.0
    for cell in same:
        seconds += gpu.train_seconds(planned.flops, planned.dtype)
        if cell.generate is not None:
            tokens = ceil(questions / cell.generate.batch) * cell.generate.max_new_tokens
            seconds += gpu.decode_seconds(tokens, planned.weights)
    problem = None
    if planned.peak > gpu.room:
        problem = f"needs {planned.peak / 1e9:.1f} GB, and {name} has room for {gpu.room / 1e9:.1f}"
    return replace(planned, seconds=seconds, problem=problem)


def refuse_unfit(cells: Sequence[Cell], questions: int, gpu: str | None) -> dict[tuple[str, str, str], str]:
    """Why cells do not fit the GPU, by their key."""
    if gpu is None:
        return {}
    plans = plan_cells(cells, questions, gpu)
    return {(one.model, one.method, one.variant): f"{one.problem}. {HINT}" for one in plans if one.problem}


def list_objects(plans: Sequence[CellPlan]) -> list[dict[str, Any]]:
    """The plans as JSON objects."""
    return [{**asdict(one), "percent": one.percent} for one in plans]


def as_table(plans: Sequence[CellPlan], gpu: str | None) -> str:
    """Format the plans as a table, what does not fit, and the shares that the paper prints beside ours."""
    heads = ("model", "method", "rows", "base", "trained", "stored", "%", "steps", "peak GB", "PFLOP")
    cells = [(*heads, *([] if gpu is None else [f"on {gpu}"]))]
    for one in plans:
        name = name_method(one.method) + (f" {one.variant}" if one.variant else "")
        row = (
            one.model.rsplit("/", 1)[-1], name, f"{one.rows} x {one.length}" if one.rows else "", one.dtype,
            f"{one.trainable:,}", f"{one.stored:,}", f"{one.percent:.3g}", f"{one.steps:,}", f"{one.peak / 1e9:.2f}",
            f"{one.flops / 1e15:.3g}",
        )  # fmt: skip
        time = "does not fit" if one.problem else format_seconds(one.seconds or 0.0)
        cells.append((*row, *([] if gpu is None else [time])))
    parts = ["\n".join(align(cells, left=4)), explain(plans, gpu)]
    unfit = [f"! {one.model} {name_method(one.method)} {one.problem}" for one in plans if one.problem]
    if unfit:
        parts.append("\n".join([*unfit, HINT]))
    beside = [
        (one.model.rsplit("/", 1)[-1], name_method(one.method), f"{one.percent:.3g} %",
         "" if one.printed is None else f"{one.printed:g} %", one.remark)
        for one in plans
        if one.remark
    ]  # fmt: skip
    if beside:
        lines = align([("model", "method", "ours", "printed", ""), *beside], left=5)
        parts.append("\n".join(["Shares of Table 3 beside ours (stored parameters):", *lines]))
    return "\n\n".join(parts)


def explain(plans: Sequence[CellPlan], gpu: str | None) -> str:
    """What the columns mean, and the sum."""
    text = (
        "peak = weights + AdamW's moments + the most that a step adds, in GB of 10^9 bytes. PFLOP: of the training of\n"
        "one seed. stored: without the reparameterization MLP of a prefix."
    )
    if gpu is None:
        return text
    total = sum(one.seconds or 0.0 for one in plans if one.problem is None)
    return (
        f"{text} Times on {gpu}: training at {UTILIZATION:.0%} of its peak,\nanswers at {BANDWIDTH_USED:.0%} of its "
        f"bandwidth (assumed), of all seeds; {format_seconds(total)} for all that fit."
    )
