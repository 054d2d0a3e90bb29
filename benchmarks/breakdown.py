"""Where the time of a LoRA step goes, ours and PEFT's, by kind of operator, beside the time its products must take.

    python benchmarks/breakdown.py --model FOLDER --out benchmarks/results/breakdown-cpu.json

One row of `--length` random tokens, one document, rank 16 on all linears, float32: forward, backward and AdamW. torch's
profiler adds up the time of each operator itself, without the operators that it calls. `limit`: the step's floating
point operations at the rate of this processor's best large product, measured in the same process.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import measure
import torch
from torch.profiler import ProfilerActivity, profile

from minipeft.models.products import fast_products

KINDS = {  # by a part of the operator's name, the first that fits
    "products": ("mm", "linear", "bmm"),
    "attention": ("attention",),
    "loss and softmax": ("softmax", "nll", "cross_entropy", "exp", "logsumexp", "amax", "scatter", "gather", "log"),
    "copies and memory": ("copy", "cat", "empty", "clone", "fill", "zero", "contiguous", "slice", "split"),
    "optimizer and norms of gradients": ("foreach", "adamw", "vector_norm", "optimizer", "Optimizer"),
}
OTHER = "other elementwise"


def make_ours(source: str, ids: torch.Tensor) -> Callable[[], object]:
    """A step of minipeft."""
    import minipeft
    from minipeft.data.packing import Batch

    model = minipeft.load_model(source, dtype=torch.float32)
    minipeft.add_adapter(model, minipeft.LoRAConfig(16, 32))
    batch = Batch(ids, ids, torch.zeros_like(ids))
    steps = minipeft.train(model, [batch] * 100, minipeft.TrainConfig(steps=100, learning_rate=1e-4))
    return lambda: next(steps)


def make_theirs(source: str, ids: torch.Tensor) -> Callable[[], object]:
    """The same step of transformers and PEFT."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return step


def profile_step(step: Callable[[], object]) -> dict[str, float]:
    """Seconds by kind of one step, after one to warm up."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    seconds = dict.fromkeys([*KINDS, OTHER], 0.0)
    for event in found.key_averages():
        name = event.key.removeprefix("aten::")
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), OTHER)
        seconds[kind] += event.self_cpu_time_total / 1e6
    return seconds


def main() -> None:
    """Profile both and print seconds and shares side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3, help="the best of each kind is kept (default: %(default)s)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the profiler adds up the time of operators, and measure_peak that of all threads
    ids = torch.randint(0, 1000, (1, options.length), generator=torch.Generator().manual_seed(0))
    sides = {"PEFT": make_theirs(options.model, ids), "minipeft": make_ours(options.model, ids)}
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side, step in sides.items():
            rounds[side].append(profile_step(step))
    best = {side: {kind: min(one[kind] for one in found) for kind in found[0]} for side, found in rounds.items()}
    limit = count_products(options.model, options.length) / measure_peak()
    print(f"{'seconds of a step':34}" + "".join(f"{side:>10}" for side in sides))
    for kind in [*KINDS, OTHER]:
        print(f"{kind:34}" + "".join(f"{best[side][kind]:10.3f}" for side in sides))
    print(f"{'all':34}" + "".join(f"{sum(best[side].values()):10.3f}" for side in sides))
    print(f"{'limit: its products at the best rate':34} {limit:9.3f}")
    if options.out:
        around = {"device": measure.describe_device("cpu"), "versions": measure.read_versions(("transformers", "peft"))}
        around |= {"commit": measure.read_commit(), "command": measure.format_command()}
        options.out.write_text(json.dumps({**around, "seconds": best, "limit": limit}, indent=1) + "\n")


def count_products(source: str, length: int) -> float:
    """FLOPs of the products of a step: forward, and backward with respect to x (and A and B, which are small)."""
    from minipeft.models.checkpoint import read_config
    from minipeft.runs.planning import count_train_flops

    config = read_config(Path(source) / "config.json")
    return count_train_flops(config, length, length, full=False)


def measure_peak() -> float:
    """The FLOP/s of the best of three large products, by processor time."""
    a, b = torch.randn(1024, 1024), torch.randn(4096, 1024)
    rates = []
    with fast_products():
        for _ in range(3):
            start = time.process_time()
            for _ in range(8):
                torch.nn.functional.linear(a, b)
            rates.append(8 * 2 * 1024 * 1024 * 4096 / (time.process_time() - start))
    return max(rates)


if __name__ == "__main__":
    main()
