"""What training on many machines would cost, on paper: bytes on the wire, and their time over that of computing.

    python benchmarks/scaling.py --out docs/scaling.md        # half a minute

Trainable parameters are counted on models without data (torch's meta device), FLOPs by runs/planning.py; nothing here
is a measurement. tests/test_scaling.py holds the page to what this script writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minipeft import FullConfig, LoRAConfig, PrefixConfig, PromptConfig
from minipeft.models import FAMILIES
from minipeft.models.config import parse_config
from minipeft.runs.planning import adapt_on_meta, count_train_flops

GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
LLAMA = {"model_type": "llama", "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
MODELS: dict[str, dict[str, Any]] = {  # the shapes in each model's config.json
    "GPT-2": GPT2 | {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "GPT-2 M": GPT2 | {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "GPT-2 L": GPT2 | {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "GPT-2 XL": GPT2 | {"n_embd": 1600, "n_layer": 48, "n_head": 25},
    "CodeGPT (both)": GPT2 | {"vocab_size": 50001, "n_embd": 768, "n_layer": 12, "n_head": 12},
    "CodeLlama-7B": LLAMA | {"vocab_size": 32016, "hidden_size": 4096, "intermediate_size": 11008,
                             "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
    "Mistral-7B": LLAMA | {"model_type": "mistral", "sliding_window": 4096, "vocab_size": 32000, "hidden_size": 4096,
                           "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                           "num_key_value_heads": 8},
    "Qwen3-32B": LLAMA | {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 25600,
                          "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
                          "tie_word_embeddings": False},
    "Llama-70B": LLAMA | {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
                          "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
}  # fmt: skip
METHODS = {"full": FullConfig(), "LoRA r16": LoRAConfig(rank=16), "prefix 20": PrefixConfig(length=20),
           "prompt 20": PromptConfig(length=20)}  # fmt: skip

TOKENS = 8192  # of each GPU in a step: one micro-batch of 8 rows of 1024
DOCUMENT = 1024  # tokens of a document
PEAK, UTILIZATION = 989e12, 0.4  # FLOP/s of an H200 in bfloat16, and the share of it that training reaches
MEMORY = 141e9  # bytes of an H200


@dataclass(frozen=True)
class Network:
    """A network between processes: bytes per second of each GPU in one direction, and seconds of a message."""

    name: str
    bandwidth: float
    latency: float


NVLINK = Network("NVLink", 450e9, 3e-6)
FAST = Network("400 Gb/s", 50e9, 10e-6)
ETHERNETS = (Network("25 Gb/s", 3.125e9, 30e-6), Network("10 Gb/s", 1.25e9, 50e-6), Network("1 Gb/s", 0.125e9, 50e-6))
CLUSTERS = ((8, NVLINK), (64, FAST), (512, FAST))
USED = 0.8  # share of a network's bandwidth that a collective reaches


@dataclass(frozen=True)
class Case:
    """A model and a method: parameters in all and trained, FLOPs of a GPU's step."""

    model: str
    method: str
    total: int
    trained: int
    layers: int
    flops: float

    @property
    def seconds(self) -> float:
        """Time of computing a step."""
        return self.flops / (PEAK * UTILIZATION)

    def sum_bytes(self, size: int) -> float:
        """Bytes that each process sends to sum gradients, exact with one micro-batch each, or in one all-reduce."""
        return 2 * 4 * self.trained * (size - 1) / size

    def shard_bytes(self, size: int) -> float:
        """Bytes that each process gets of sharded bfloat16 weights, for forward and again for backward."""
        return 2 * 2 * (self.total - self.trained) * (size - 1) / size

    def full_shard_bytes(self, size: int) -> float:
        """The same of full tuning: weights twice, and the float32 gradient once (reduce-scatter)."""
        return (2 * 2 + 4) * self.total * (size - 1) / size

    def sum_share(self, size: int, network: Network) -> float:
        """Time of the sum over that of computing, nothing overlapped: all-to-all, all-gather, W - 1 messages each."""
        wire = self.sum_bytes(size) / (USED * network.bandwidth) + 2 * (size - 1) * network.latency
        return wire / self.seconds

    def shard_share(self, size: int, network: Network) -> float:
        """The same of gathering sharded weights, a block at a time."""
        bytes_sent = self.full_shard_bytes(size) if self.method == "full" else self.shard_bytes(size)
        return (bytes_sent / (USED * network.bandwidth) + 2 * self.layers * (size - 1) * network.latency) / self.seconds


def make_cases() -> Iterator[Case]:
    """Count the parameters of each model with each method."""
    for name, given in MODELS.items():
        config = parse_config(FAMILIES[given["model_type"]].config, given)
        for method, adapter in METHODS.items():
            full = method == "full"
            _, report = adapt_on_meta(config, adapter, torch.bfloat16)
            flops = count_train_flops(config, TOKENS, DOCUMENT, full=full, activation_checkpointing=False)
            yield Case(name, method, report.total, report.trainable, config.layers, flops)


def in_bytes(number: float) -> str:
    """1234567 -> 1.2 MB"""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"


def in_percent(share: float) -> str:
    """0.0123 -> 1.2 %; more than ten times as a factor"""
    return f"{share:.0f}x" if share >= 10 else f"{100 * share:.2g} %" if share < 1 else f"{100 * share:.0f} %"


def make_table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def write_page(cases: list[Case]) -> str:
    """The page."""
    find = {(case.model, case.method): case for case in cases}
    wire = [
        [name, in_bytes(2 * find[name, "full"].total), *(in_bytes(find[name, m].sum_bytes(64)) for m in METHODS)]
        for name in MODELS
    ]
    ratio = [
        [name, method, f"{1000 * case.seconds:.0f} ms", *(in_percent(case.sum_share(*at)) for at in CLUSTERS)]
        for (name, method), case in find.items()
    ]
    shard = [
        [name, method, in_bytes(2 * find[name, "full"].total), *(in_percent(case.shard_share(*at)) for at in CLUSTERS)]
        for (name, method), case in find.items()
        if method in ("full", "LoRA r16") and case.total > 5e9
    ]
    ethernet = [
        [name, method, in_bytes(case.sum_bytes(8)), *(in_percent(case.sum_share(8, network)) for network in ETHERNETS)]
        for (name, method), case in find.items()
        if case.total > 5e9
    ]
    clusters = [f"{size} GPUs, {network.name}" for size, network in CLUSTERS]
    return PAGE.format(
        wire=make_table(["model", "weights, bf16", *METHODS], wire),
        ratio=make_table(["model", "method", "computing", *clusters], ratio),
        shard=make_table(["model", "method", "weights, bf16", *clusters], shard),
        ethernet=make_table(["model", "method", "bytes a step", *(n.name for n in ETHERNETS)], ethernet),
        **describe(find),
    )


def describe(find: dict[tuple[str, str], Case]) -> dict[str, str]:
    """The numbers in the page's text."""
    lora, full, prefix = (find["Llama-70B", method] for method in ("LoRA r16", "full", "prefix 20"))
    small = find["CodeLlama-7B", "prompt 20"]
    return {
        "tokens": f"{TOKENS:,}",
        "lora": in_bytes(lora.sum_bytes(64)),
        "full": in_bytes(full.sum_bytes(64)),
        "prefix": in_bytes(prefix.sum_bytes(64)),
        "weights": in_bytes(2 * full.total),
        "qwen": in_bytes(2 * find["Qwen3-32B", "full"].total),
        "memory": in_bytes(MEMORY),
        "states": in_bytes(16 * find["CodeLlama-7B", "full"].total),
        "gathered": in_percent(lora.shard_share(8, NVLINK)),
        "gathered_far": in_percent(lora.shard_share(64, FAST)),
        "messages": f"{1000 * 2 * 511 * FAST.latency:.0f} ms",
        "batch": f"{512 * TOKENS / 1e6:.1f} million",
        "lora_ethernet": in_percent(find["CodeLlama-7B", "LoRA r16"].sum_share(8, ETHERNETS[2])),
        "prompt_ethernet": in_percent(small.sum_share(8, ETHERNETS[2])),
        "full_ethernet": in_percent(find["CodeLlama-7B", "full"].sum_share(8, ETHERNETS[2])),
    }


PAGE = """# Many machines, on paper

Written by `python benchmarks/scaling.py --out docs/scaling.md`: arithmetic, not measurements. One H200 computes one
micro-batch of {tokens} tokens a step, at 40 % of 989 TFLOP/s in bfloat16. A network reaches 80 % of its bandwidth:
NVLink 450 GB/s in each direction within a machine of 8, 400 Gb/s for each GPU between machines. Nothing is
overlapped: a share under 100 % can be hidden behind computing, in principle. minipeft itself has run on at most 4
processes on one machine, on CPUs ([docs/distributed.md](distributed.md)).

## Bytes that each process sends in a step

The gradients of the trained parameters in float32, twice: 2 x 4 n (W - 1) / W bytes, here with W = 64. The exact
sum with one micro-batch for each process sends as much as one all-reduce.

{wire}

For Llama-70B that is {full} with full tuning, {lora} with LoRA and {prefix} with a prefix: only what is trained
travels.

## Time of the sum over time of computing

Bandwidth and messages: an all-to-all and an all-gather of W - 1 messages each.

{ratio}

- LoRA, prefix and prompt: bandwidth is no limit on any of these clusters. On 512 GPUs the sum is bound by its 2 x
  511 messages ({messages}), whatever their size: small models feel it. `--reduce fast` leaves the order to NCCL,
  which uses trees there.
- Full tuning with whole weights on each GPU is bound by bandwidth between machines.

## Where sharding starts to pay

Sharding gathers all weights twice a step, which whole weights need not. It pays where the weights leave too little
of {memory} for activations: an adapter on Qwen3-32B ({qwen}) fits whole on one H200, Llama-70B ({weights}) does
not. Full tuning keeps 16 bytes for each parameter (float32 weight, gradient and two moments), and needs sharding
from CodeLlama-7B on once activations are added ({states}). The time of gathering over that of computing, with the
reduce-scatter of full tuning:

{shard}

Shard within a machine: over NVLink gathering Llama-70B takes {gathered} of the computing time, which prefetching
the next block can hide; over 400 Gb/s {gathered_far}. minipeft shards over all processes of a run; sharding within
each machine and replicating between them (FSDP2 on a mesh of two dimensions) is not there.

## What breaks first

1. **The batch.** 512 GPUs with one micro-batch each make a step of {batch} tokens. CoNaLa's 2,379 pairs are less
   than one such step: for small data sets the useful number of processes is the number of micro-batches that a step
   should have.
2. **Messages** of the exact sum, from some hundreds of processes on (above).
3. **Rank 0**: it reads the signs of life of all processes four times a second and sends a sharded model to all of
   them. It is untested beyond 4 processes.
4. **Gathering** over the network between machines, if weights are sharded over it.

## Ordinary Ethernet

Eight machines with one H200 each, whole weights on each:

{ethernet}

A prompt costs {prompt_ethernet} of CodeLlama-7B's computing time over 1 Gb/s and LoRA {lora_ethernet}; full tuning
{full_ethernet}. LoRA over 1 Gb/s needs `--accumulate 64` on 8 processes to come to an eighth of that in the fast
sum, which sends once a step; the exact sum sends once a round of W micro-batches. Machines of a laboratory on 10
Gb/s can train LoRA together; 1 Gb/s is enough for prompts and prefixes.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    page = write_page(list(make_cases()))
    print(page)
    if options.out:
        options.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
