"""Full tuning that fits: peak memory and time of a step by dtype and optimizer, and what bfloat16 weights lose.

    OMP_NUM_THREADS=1 python benchmarks/full_tuning.py --model FOLDER
    OMP_NUM_THREADS=1 python benchmarks/full_tuning.py --curves results/full-bf16/curves.json

Memory: each variant in a process of its own, a row of `--length` tokens a step; the peak of the process in the last
step, beside what `minipeft plan` predicts without the process.

Curves: the demo model on its data, held-out loss by step, with the optimizer's rounding as the only difference: weights
stored in float32, in bfloat16 with minipeft's update, and in bfloat16 with torch.optim.AdamW, whose moments are
bfloat16 too. Products are float32 in all three, of the stored weights: emulated bfloat16 would take six times as long.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
import torch
from torch import nn

from minipeft.data.packing import Batch, Batches
from minipeft.documents import derive_seed
from minipeft.models import Decoder
from minipeft.runs.config import run_config
from minipeft.runs.planning import plan
from minipeft.runs.preparation import load_adapted, pack_data, prepare, set_steps
from minipeft.training import adamw, loop
from minipeft.training.gradients import wide_gradients
from minipeft.training.loop import TrainConfig, TrainState, evaluate, learning_rate_at, train, trained
from minipeft.training.processes import Alone

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # dtype and settings
    "fp32": ("float32", {}),
    "fp32, optimizer in backward, clipped": ("float32", {"optimizer_in_backward": True}),
    "fp32, optimizer in backward": ("float32", {"optimizer_in_backward": True, "clip": 0}),
    "bf16": ("bfloat16", {}),
    "bf16, optimizer in backward": ("bfloat16", {"optimizer_in_backward": True, "clip": 0}),
}
FLOAT, ROUNDED, PURE = "float32", "bfloat16, stochastic rounding", "bfloat16, torch.optim.AdamW"
EVERY = 25  # steps between two evaluations


def serve_steps(variant: str, source: str, length: int, rounds: int) -> None:
    """Take a step to warm up and then `rounds`; print the processor seconds of each, the peak and the plan's peak."""
    import minipeft

    name, settings = VARIANTS[variant]
    dtype = getattr(torch, name)
    model = minipeft.load_model(source, dtype=dtype)
    minipeft.add_adapter(model, minipeft.FullConfig())
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, ids, torch.zeros_like(ids))
    config = TrainConfig(steps=1 + rounds, learning_rate=1e-5, **settings)
    seconds = []
    steps = train(model, [batch] * (1 + rounds), config)
    for number in range(1 + rounds):
        if number == rounds:
            Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM (man proc_pid_clear_refs)
        start = time.process_time()
        next(steps)
        seconds.append(time.process_time() - start)
    planned = plan(
        model.config, minipeft.FullConfig(), length=length, dtype=dtype,
        optimizer_in_backward=config.optimizer_in_backward, passes=config.passes,
    )  # fmt: skip
    status = Path("/proc/self/status").read_text().splitlines()
    peak = 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds[1:], "peak": peak, "planned": planned.peak}))


def measure_memory(options: argparse.Namespace) -> None:
    """Measure all variants and write the rows."""
    found = {}
    for variant in options.variants:
        command = [sys.executable, __file__, "--model", options.model, "--length", str(options.length)]
        command += ["--rounds", str(options.rounds), "--child", variant]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[variant] = json.loads(done.stdout.splitlines()[-1])
        print(variant, found[variant], flush=True)
    first = found[options.variants[0]]
    rows = [
        measure.make_row(
            variant,
            one["seconds"],
            first["seconds"],
            benchmark="full tuning",
            shape=f"1x{options.length}",
            dtype=VARIANTS[variant][0],
            memory_bytes=one["peak"],
            note="processor seconds",
            extra={"planned_bytes": one["planned"], "memory_ratio": first["peak"] / one["peak"]},
        )
        for variant, one in found.items()
    ]
    measure.show_rows(rows)
    measure.write_rows(options.out, rows)


def take_steps(model: Decoder, batches: Batches, config: TrainConfig, variant: str) -> Iterator[float]:
    """Train a float32 model whose weights are those that a variant stores; yields each step's loss."""
    if variant == FLOAT:
        yield from (step.loss for step in train(model, batches, config))
        return
    parameters = trained(model)
    stored = {name: nn.Parameter(p.detach().bfloat16()) for name, p in parameters.items()}
    step_optimizer = make_rounded(stored, config) if variant == ROUNDED else make_pure(stored, config)
    for number in range(config.steps or 0):
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(stored[name])
        model.train()
        model.zero_grad()
        batch = batches[number]
        yield loop.backward(model, batch, loop.count_targets(batch.labels), derive_seed(config.seed, number, 0))
        step_optimizer(number, {name: p.grad for name, p in parameters.items() if p.grad is not None})


def make_rounded(
    stored: dict[str, nn.Parameter], config: TrainConfig
) -> Callable[[int, dict[str, torch.Tensor]], None]:
    """minipeft's update of bfloat16 weights."""
    state = TrainState(nn.ParameterDict({name.replace(".", "/"): p for name, p in stored.items()}))
    by_path = {name.replace(".", "/"): p for name, p in stored.items()}

    def step(number: int, gradients: dict[str, torch.Tensor]) -> None:
        rates = dict.fromkeys(by_path, learning_rate_at(number, config))
        norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()
        with wide_gradients(by_path.values()):
            for name, p in stored.items():
                p.grad = gradients[name]
            adamw.update_all(by_path, state, config, rates, norm)
        state.step += 1

    return step


def make_pure(stored: dict[str, nn.Parameter], config: TrainConfig) -> Callable[[int, dict[str, torch.Tensor]], None]:
    """torch.optim.AdamW of bfloat16 weights, gradients and moments."""
    optimizer = torch.optim.AdamW(
        list(stored.values()), betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=config.weight_decay
    )

    def step(number: int, gradients: dict[str, torch.Tensor]) -> None:
        for name, p in stored.items():
            p.grad = gradients[name].bfloat16()
        nn.utils.clip_grad_norm_(stored.values(), config.clip)
        optimizer.param_groups[0]["lr"] = learning_rate_at(number, config)
        optimizer.step()

    return step


def draw_curves(options: argparse.Namespace) -> None:
    """Train the three variants at each learning rate, write their losses, and draw the held-out ones."""
    found = {}
    for rate in options.rates:
        chosen: dict[str, Any] = {"model": "demo", "data": "demo", "dtype": "fp32", "length": 64, "held_out": 30}
        config = run_config("full", steps=options.steps, learning_rate=rate, **chosen)
        prepared = prepare(config.model, config.data)
        for variant in (FLOAT, ROUNDED, PURE):
            model, _ = load_adapted(config, prepared.tokenizer, Alone())
            batches, held_out = pack_data(config, model, prepared, print)
            settings = replace(set_steps(config, len(batches)), weight_decay=0.0)
            losses: list[float] = []
            held = [(0, evaluate(model, held_out))]
            for number, loss in enumerate(take_steps(model, batches, settings, variant), 1):
                losses.append(loss)
                if number % EVERY == 0:
                    held.append((number, evaluate(model, held_out)))
            found[f"{rate:g}, {variant}"] = {"rate": rate, "variant": variant, "losses": losses, "held_out": held}
            print(rate, variant, held[-1], flush=True)
    about = {"command": measure.format_command(), "commit": measure.read_commit(), "versions": measure.read_versions()}
    options.curves.parent.mkdir(parents=True, exist_ok=True)
    options.curves.write_text(json.dumps({**about, "curves": list(found.values())}) + "\n")
    draw(list(found.values()), options.curves.with_suffix(".svg"))


def draw(curves: list[dict[str, Any]], file: Path) -> None:
    """Draw a panel for each learning rate."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    rates = sorted({curve["rate"] for curve in curves})
    figure, panels = pyplot.subplots(1, len(rates), figsize=(4.5 * len(rates), 3.5), squeeze=False)
    for rate, axes in zip(rates, panels[0]):
        for curve, style in zip([c for c in curves if c["rate"] == rate], ("-o", "--s", ":^")):
            axes.plot(*zip(*curve["held_out"]), style, markersize=4, label=curve["variant"])
        axes.set(xlabel="step", ylabel="held-out loss, nats per token", title=f"peak learning rate {rate:g}")
        axes.legend(fontsize=7)
    figure.savefig(file, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "full-tuning-cpu.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--curves", type=Path, metavar="FILE", help="train the demo model, and write and draw losses")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-5, 1e-3], help="peak learning rates")
    options = parser.parse_args()
    if options.child:
        serve_steps(options.child, options.model, options.length, options.rounds)
    elif options.curves:
        draw_curves(options)
    else:
        measure_memory(options)


if __name__ == "__main__":
    main()
