"""Estimates for a whole run, made before any weight is read: disk space, memory and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from minipeft.adapters import find_method
from minipeft.data.packing import Batch, Batches, PackConfig
from minipeft.errors import InputError
from minipeft.files import read_object
from minipeft.hub import fetch
from minipeft.models import Decoder
from minipeft.models.checkpoint import check_device, read_config
from minipeft.runs.checkpoints import check_space
from minipeft.runs.config import DTYPES, ModelConfig, RunConfig
from minipeft.runs.planning import (
    EFFICIENCY,
    MOST_LAYERS,
    Plan,
    adapt_on_meta,
    count_forward_flops,
    count_train_flops,
    format_seconds,
    plan,
    probe_flops,
    probe_threads,
)
from minipeft.training.loop import TrainConfig


def check_disk(config: RunConfig, out: Path) -> None:
    """Check that the disk has room for the run, from config.json, before any weight is read."""
    base = read_config(fetch(config.model.source, ["config.json"], revision=config.model.revision) / "config.json")
    if base.layers > MOST_LAYERS:  # loading compares the number of layers with the weights before building any
        return
    _, report = adapt_on_meta(base, config.adapter, torch.float32)
    check_space(out, report.trainable, more=4 * report.trainable)


def plan_row(model: ModelConfig, adapter: Any, packing: PackConfig, train: TrainConfig) -> dict[str, Any]:
    """Make a row of `minipeft plan` from config.json alone: memory in bytes, and seconds per step on this machine.

    Raises:
        InputError: the model's config.json cannot be read; the adapter or the rows do not fit it.
    """
    check_device(model.device)
    found = plan_step(model, adapter, packing, train)
    dtype = getattr(torch, found.dtype)
    return {
        "model": model.source,
        **asdict(found),
        "percent": found.percent,
        "peak": found.peak,
        "activation_checkpointing": train.activation_checkpointing,
        "optimizer_in_backward": train.optimizer_in_backward,
        "seconds": found.flops / (EFFICIENCY * probe_flops(dtype, torch.device(model.device))),
    }


def plan_step(model: ModelConfig, adapter: Any, packing: PackConfig, train: TrainConfig) -> Plan:
    """Plan a step from the model's config.json; `packing.length` is that of the text alone.

    Raises:
        InputError: as `plan_row`.
    """
    base, dtype = read_base(model)
    if find_method(adapter).trains_base and model.dtype is None:
        dtype = torch.float32
    return plan(
        base,
        adapter,
        rows=packing.batch,
        length=packing.length,
        dtype=dtype,
        quantize=model.quantize,
        **describe_passes(train),
    )


def describe_passes(train: TrainConfig) -> dict[str, Any]:
    """The arguments of `plan` that come from the training settings."""
    names = ("activation_checkpointing", "optimizer_in_backward", "passes")
    return {name: getattr(train, name) for name in names}


def read_base(model: ModelConfig) -> tuple[Any, torch.dtype]:
    """Read a model's config.json, and the dtype that it is loaded in: the given one, or that of the file.

    Raises:
        InputError: config.json cannot be read.
    """
    file = fetch(model.source, ["config.json"], revision=model.revision) / "config.json"
    base, given = read_config(file), read_object(file)
    stored = given.get("dtype") or given.get("torch_dtype")
    return base, DTYPES[model.dtype or ("fp32" if stored in (None, "float32") else "bf16")]


def choose_row_length(packing: PackConfig, model: Decoder) -> int:
    """Choose the tokens of a row, virtual tokens included.

    Raises:
        InputError: more than the model's context.
    """
    length = packing.length or min(1024, model.config.context)
    if length > model.config.context:
        raise InputError(f"{length} exceeds the model's context of {model.config.context}", where="length")
    return length


def choose_evaluation_interval(config: RunConfig, batches: Batches) -> int:
    """Choose the steps between evaluations: one epoch, unless the config says otherwise."""
    return config.evaluate_every or max(1, len(batches) // config.train.accumulate)


def estimate(config: RunConfig, train: TrainConfig, model: Decoder, batches: Batches, held_out: Sequence[Batch]) -> str:
    """Format the work of the run, evaluations included, and estimates of its time here and its memory."""
    assert train.steps is not None
    packed, tokens = batches.report, batches.report.tokens_out / len(batches) * train.accumulate * train.steps
    weight, document = model.embedding.weight, packed.tokens_out // packed.documents
    full, again = config.method.trains_base, train.activation_checkpointing
    flops = train.passes * count_train_flops(model.config, tokens, document, full=full, activation_checkpointing=again)
    evaluations = 1 + train.steps // choose_evaluation_interval(config, batches) if held_out else 0
    evaluated = packed.tokens_out / packed.documents * config.data.held_out  # tokens
    flops += evaluations * count_forward_flops(model.config, evaluated, document)
    seconds = flops / (EFFICIENCY * probe_flops(weight.dtype, weight.device))
    work = f"{train.steps} steps at a learning rate of {train.learning_rate:g}, {tokens:,.0f} tokens"
    length = min(choose_row_length(config.packing, model), model.config.context - model.virtual_tokens)
    shape: dict[str, Any] = {"rows": config.packing.batch, "length": length, "quantize": config.model.quantize}
    shape |= describe_passes(train)
    peak = plan(model.config, config.adapter, dtype=weight.dtype, **shape).peak
    return f"{work}: about {format_seconds(seconds)} here, and {peak / 1e9:.2g} GB beside the process"


def describe_slow_threads(held: float = 1.5) -> str | None:
    """Say that one CPU thread is faster than those that torch uses, as it is where another process keeps a core busy:
    threads spin while they wait for the one that has no core. None where they take less than `held` times as long."""
    threads = torch.get_num_threads()
    if threads == 1:
        return None
    ratio = probe_threads(1) / probe_threads(threads)
    slow = f"{threads} threads take {ratio:.1f} times as long as one for small products: other processes use the cores"
    return f"{slow}; --threads 1 is faster" if ratio > held else None


def describe_slow_dtype(model: Decoder, held: float = 2.0) -> str | None:
    """Name a dtype whose products this processor emulates, as bfloat16's without AMX or AVX-512; None where they take
    less than `held` times as long as float32's."""
    weight = model.embedding.weight
    if weight.dtype == torch.float32 or weight.device.type != "cpu":
        return None
    ratio = probe_flops(torch.float32, weight.device) / probe_flops(weight.dtype, weight.device)
    name = str(weight.dtype).removeprefix("torch.")
    faster = f"this processor takes {ratio:.1f} times as long for products in {name} as in float32"
    return f"{faster}; --dtype fp32 is faster, and takes twice the memory" if ratio > held else None
