"""Time to write a checkpoint: ours (synced, with checksums, removing old ones) against Hugging Face's Trainer.

    python benchmarks/checkpoint.py MODEL_FOLDER [--saves 20] [--out benchmarks/results/checkpoint.json]

First, LoRA of rank 1 on every linear of the given model. Both write a complete checkpoint (adapter, AdamW's moments,
the state of the run) and keep the last two; Trainer does not sync. Then a save against a training step of the demo
model (LoRA of rank 16, one row of 512 tokens a step): the overhead of saving every 50 steps.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import measure, show_rows, write_rows

from minipeft.adapters import LoRAConfig, add_adapter
from minipeft.data.examples import encode_pairs, load_pairs
from minipeft.data.packing import pack
from minipeft.data.tokens import load_tokenizer
from minipeft.models.checkpoint import load_model
from minipeft.runs.checkpoints import open_run
from minipeft.training.loop import TrainConfig, TrainState, train, trained


def ours(folder: Path, out: Path, rank: int) -> tuple[Callable[[int], None], int, Callable[[], int]]:
    """Return a function that saves a step, the number of trained parameters, and one for a checkpoint's size."""
    model = load_model(folder)
    add_adapter(model, LoRAConfig(rank))
    state = TrainState(model)
    draw = torch.Generator().manual_seed(0)
    for moments in (state.exp_avg, state.exp_avg_sq):
        for tensor in moments.values():
            tensor.uniform_(generator=draw)
    run = open_run(out, {}, resume=False, overwrite=False)

    def save(step: int) -> None:
        state.step = step
        run.save(model, state)

    size = lambda: sum(file.stat().st_size for file in run.committed()[0].iterdir())
    return save, sum(p.numel() for p in trained(model).values()), size


def trainers(folder: Path, out: Path, rank: int) -> tuple[Callable[[int], None], int]:
    """Return the same for transformers' Trainer with PEFT, without the size."""
    import peft
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(folder)
    model = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = TrainingArguments(output_dir=str(out), save_total_limit=2, report_to=[], use_cpu=True)
    trainer: Any = Trainer(model=model, args=arguments)
    trainer.create_optimizer_and_scheduler(num_training_steps=1000)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.rand_like(p)
    trainer.optimizer.step()

    def save(step: int) -> None:
        trainer.state.global_step = step
        trainer._save_checkpoint(model, None)

    return save, sum(p.numel() for p in model.parameters() if p.requires_grad)


def make_demo_run(out: Path) -> tuple[Callable[[], object], Callable[[], None]]:
    """Return a training step of the demo model with LoRA, and a save of its run."""
    model, tokenizer = load_model("demo"), load_tokenizer("demo")
    add_adapter(model, LoRAConfig(16))
    batches = pack(encode_pairs(load_pairs("demo"), tokenizer), tokenizer, length=512, batch=1)
    state = TrainState(model)
    steps = train(model, batches, TrainConfig(steps=10_000), state)
    run = open_run(out, {}, resume=False, overwrite=False)
    saves = itertools.count(10_001)

    def save() -> None:
        step, state.step = state.step, next(saves)  # a step is saved only once
        run.save(model, state)
        state.step = step

    return lambda: next(steps), save


def count_steps(save: Callable[[int], None]) -> Callable[[], None]:
    """Return a function without arguments that saves the next step."""
    steps = itertools.count(1)
    return lambda: save(next(steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--saves", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/checkpoint.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=".") as work:
        save, numbers, size = ours(options.model, Path(work, "ours"), options.rank)
        peer, theirs = trainers(options.model, Path(work, "peer"), options.rank)
        assert numbers == theirs, (numbers, theirs)
        both = {"transformers": count_steps(peer), "minipeft": count_steps(save)}
        shape, packages = f"{numbers} trained numbers, LoRA rank {options.rank}", ("transformers", "peft")
        rows = measure(both, name="checkpoint", shape=shape, dtype="float32", rounds=options.saves, packages=packages)
        print(f"{size():,} bytes a checkpoint, {size() / numbers:.3f} a trained number")
        step, save_demo = make_demo_run(Path(work, "demo"))
        pair = {"a step": step, "a save": save_demo}
        rows += measure(pair, name="demo run", shape="LoRA rank 16, 512 tokens", dtype="float32", rounds=options.saves)
        print(f"saving every 50 steps costs {rows[-1].median / (50 * rows[-2].median):.2%}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_rows(options.out, rows)
    show_rows(rows)


if __name__ == "__main__":
    main()
