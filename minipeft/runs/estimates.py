"""What a run of a TuneConfig will take: room on the disk, memory and time, found before anything large is read."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from minipeft.adapters import LoRAConfig, PrefixConfig, PromptConfig
from minipeft.adapters.lora import plan as lora_plan
from minipeft.data.packing import Batches
from minipeft.errors import InputError
from minipeft.files import read_object
from minipeft.hub import fetch
from minipeft.models import Decoder
from minipeft.models.checkpoint import read_config
from minipeft.runs.checkpoints import check_space
from minipeft.runs.config import DTYPES, TuneConfig
from minipeft.runs.planning import (
    EFFICIENCY,
    MOST_LAYERS,
    forward_flops,
    in_words,
    plan,
    probe_flops,
    train_flops,
    without_data,
)
from minipeft.runs.process import check_device
from minipeft.training.loop import TrainConfig


def check_room(config: TuneConfig, out: Path) -> None:
    """Refuse a disk that is too small for the run: found from config.json, before any weight is read."""
    folder = fetch(config.model, ["config.json"], revision=config.revision)
    base = read_config(folder / "config.json")
    if base.layers > MOST_LAYERS:  # held against the weights before any layer is built
        return
    model = without_data(base)
    adapter, numbers = config.adapter(), sum(p.numel() for p in model.parameters())
    if isinstance(adapter, LoRAConfig):
        shapes = {
            path: (rank, model.get_parameter(f"{path}.weight")) for path, (rank, _) in lora_plan(model, adapter).items()
        }
        numbers = sum(rank * sum(weight.shape) for rank, weight in shapes.values())
    elif isinstance(adapter, PrefixConfig):
        columns = base.layers * 2 * base.kv_heads * base.head_width
        numbers = adapter.length * columns + (adapter.reparam or 0) * (base.width + columns)
    elif isinstance(adapter, PromptConfig):
        numbers = adapter.length * base.width + (adapter.reparam or 0) * 2 * base.width
    check_space(out, numbers, more=4 * numbers)


def plan_of(config: TuneConfig) -> dict[str, Any]:
    """What a run would take, from config.json alone (planning.py): memory in bytes, and seconds a step on this machine.

    Raises:
        InputError: the model's config.json cannot be read; the adapter or the rows do not fit it.
    """
    check_device(config.device)
    file = fetch(config.model, ["config.json"], revision=config.revision) / "config.json"
    base, own = read_config(file), read_object(file)
    named = own.get("dtype") or own.get("torch_dtype")
    dtype = DTYPES[config.dtype or ("fp32" if config.method == "full" or named in (None, "float32") else "bf16")]
    shape: dict[str, Any] = {
        "rows": config.batch,
        "length": config.length,
        "activation_checkpointing": config.activation_checkpointing,
    }
    found = plan(base, config.adapter(), dtype=dtype, **shape)
    seconds = found.flops / (EFFICIENCY * probe_flops(dtype, torch.device(config.device)))
    return {
        "model": config.model,
        **asdict(found),
        "percent": found.percent,
        "peak": found.peak,
        "dtype": str(dtype).removeprefix("torch."),
        "activation_checkpointing": config.activation_checkpointing,
        "seconds": seconds,
    }


def length_of(config: TuneConfig, model: Decoder) -> int:
    """Tokens of a row."""
    length = config.length or min(1024, model.config.context)
    if length > model.config.context:
        raise InputError(f"{length} exceeds the model's context of {model.config.context}", where="length")
    return length


def evaluated_every(config: TuneConfig, batches: Batches) -> int:
    """Steps between evaluations: once an epoch, unless the caller says."""
    return config.evaluate_every or max(1, len(batches) // config.accumulate)


def estimate(config: TuneConfig, settings: TrainConfig, model: Decoder, batches: Batches, dev: list[Any]) -> str:
    """How much work lies ahead, evaluations included, about how long it will take here, and in how much memory."""
    held, tokens = batches.report, batches.report.tokens_out / len(batches) * settings.accumulate * settings.steps
    weight, document = model.embedding.weight, batches.report.tokens_out // batches.report.documents
    whole, again = config.method == "full", config.activation_checkpointing
    flops = train_flops(model.config, tokens, document, full=whole, activation_checkpointing=again)
    times = 1 + settings.steps // evaluated_every(config, batches) if dev else 0
    flops += times * forward_flops(model.config, held.tokens_out / held.documents * config.held_out, document)
    seconds = flops / (EFFICIENCY * probe_flops(weight.dtype, weight.device))
    ahead = f"{settings.steps} steps at a rate of {settings.learning_rate:g}, {tokens:,.0f} tokens"
    length = min(length_of(config, model), model.config.context - model.virtual_tokens)
    shape: dict[str, Any] = {"rows": config.batch, "length": length, "activation_checkpointing": again}
    peak = plan(model.config, config.adapter(), dtype=weight.dtype, **shape).peak
    return f"{ahead}: about {in_words(seconds)} here, and {peak / 1e9:.2g} GB beside the process"
