"""The numbers of the last stops: a Triton kernel in the interpreter, and the memory of a training step."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping

import torch

from minipeft.adapters import FullConfig, LoRAConfig, PrefixConfig, PromptConfig
from minipeft.errors import InputError
from minipeft.models import FAMILIES
from minipeft.runs.planning import count_train_flops, plan
from minipeft.tour.bench import Bench
from minipeft.tour.values import Plain, Table, Value, claim

ROW = 256  # tokens
SEVEN_B = {  # config.json of CodeLlama-7B
    "vocab_size": 32016, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 16384,
}  # fmt: skip


def measure_kernel(bench: Bench) -> Mapping[str, Value]:
    """The first kernel, run in Triton's interpreter if Triton is installed."""
    ran, found = "was not run, because Triton is not installed", {"entries": 1000, "block": 256, "programs": 4}
    if importlib.util.find_spec("triton") is not None:
        found = run_interpreted("minipeft_kernels.vector_add")
        claim(found["error"] == 0, "the kernel's sums are torch's, to the bit")
        ran = "ran in Triton's interpreter when this page was built, and its sums equal torch's to the bit"
    covered = found["programs"] * found["block"]
    return {
        "ran": ran,
        "entries": found["entries"],
        "block": found["block"],
        "programs": found["programs"],
        "masked": covered - found["entries"],
    }


def run_interpreted(module: str) -> dict[str, int]:
    """Run a kernel's module in Triton's interpreter, in a process of its own: it must be chosen before the import.

    Raises:
        InputError: the process fails; with the end of its error.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-m", module], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{module} failed: {done.stderr[-300:]}", where="tour")
    found: dict[str, int] = json.loads(done.stdout)
    return found


def measure_memory(bench: Bench) -> Mapping[str, Value]:
    """The memory of a training step by method, counted on the meta device."""
    config = bench.model().config if bench.quick else FAMILIES["llama"].config(**SEVEN_B)
    rows: list[tuple[Plain, ...]] = []
    plans = {}
    settings = {
        "full": FullConfig(),
        "lora": LoRAConfig(rank=16),
        "prefix": PrefixConfig(length=20),
        "prompt": PromptConfig(length=20),
    }
    for name, adapter in settings.items():
        dtype = torch.float32 if name == "full" else torch.bfloat16
        plans[name] = p = plan(config, adapter, rows=1, length=ROW, dtype=dtype)
        rows.append(
            (name, p.trainable, p.percent, *(f"{size / 1e9:.2f}" for size in (p.weights, p.moments, p.step, p.peak)))
        )
    full_again = count_train_flops(config, ROW, ROW, full=True, activation_checkpointing=True)
    again = plan(config, settings["lora"], rows=1, length=ROW, dtype=torch.bfloat16, activation_checkpointing=True)
    claim(plans["full"].moments > 10 * plans["lora"].moments, "AdamW's moments are what LoRA saves")
    claim(again.step < 0.7 * plans["lora"].step, "activation checkpointing saves activations")
    head = ("method", "trained", "% of all", "weights", "AdamW", "step", "peak, GB")
    return {
        "model": "the demo model" if bench.quick else "CodeLlama-7B",
        "length": ROW,
        "table": Table(head, rows),
        "full_peak": plans["full"].peak / 1e9,
        "lora_peak": plans["lora"].peak / 1e9,
        "lora_percent": plans["lora"].percent,
        "step": plans["lora"].step / 1e9,
        "again": again.step / 1e9,
        "more": 100 * (again.flops / plans["lora"].flops - 1),
        "more_full": 100 * (full_again / plans["full"].flops - 1),
        "layers": config.layers,
    }
