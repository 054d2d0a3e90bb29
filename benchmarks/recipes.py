"""How much of a gain is the recipe and how much the library: two LoRA recipes in minipeft and in HF PEFT.

    OMP_NUM_THREADS=1 python benchmarks/recipes.py --model FOLDER --data conala-paired-train.json \\
        --test conala-paired-test.json --library peft --recipe ours --out runs/recipes

recipe  loss on       documents of a row     row    learning rate           epochs
ours    the response  do not see each other    512  5e-4, linear, 6 % warm-up    3
theirs  all tokens    are joined              1024  3e-4, cosine, 5 % warm-up    2

Both train LoRA r16, alpha 32, dropout 0.05 on all linears of the blocks, a row a step, AdamW without weight decay, clip
1.0, a float32 base. Both libraries get the same rows in the same order, packed by minipeft; PEFT's model gets the
isolation as a 4-D mask and position ids. Both adapters are PEFT files: minipeft answers the test questions with either
one and scores the answers. A run that was stopped goes on where its last checkpoint was written.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import measure
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from minipeft.data.packing import Batch
from minipeft.documents import derive_seed, positions_in, visible
from minipeft.runs.config import RunConfig, run_config
from minipeft.runs.preparation import load_adapted, pack_data, prepare, set_steps
from minipeft.training.loop import learning_rate_at
from minipeft.training.processes import Alone

SHARED = {"method": "lora", "rank": 16, "alpha": 32.0, "dropout": 0.05, "weight_decay": 0.0, "beta2": 0.999,
          "clip": 1.0, "batch": 1, "dtype": "fp32"}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "ours": {"length": 512, "isolate": True, "loss_mask": "response", "learning_rate": 5e-4, "decay": "linear",
             "warmup": 0.06, "epochs": 3.0},
    "theirs": {"length": 1024, "isolate": False, "loss_mask": "all", "learning_rate": 3e-4, "decay": "cosine",
               "warmup": 0.05, "epochs": 2.0},
}  # fmt: skip
ANSWERS = ("--temperature", "0.2", "--top-p", "0.95", "--max-new-tokens", "64", "--seed", "0")
SAVE_EVERY = 25  # steps between checkpoints


def make_config(options: argparse.Namespace) -> RunConfig:
    """The settings of a run, of either library."""
    chosen = {**SHARED, **RECIPES[options.recipe]}
    return run_config(chosen.pop("method"), model=options.model, data=options.data, seed=options.seed, **chosen)


def run(*command: str) -> str:
    """Run minipeft's command line and return what it printed."""
    return subprocess.run(
        [sys.executable, "-m", "minipeft", *command], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def train_ours(options: argparse.Namespace, folder: Path) -> Path:
    """Train with minipeft's command line; returns the adapter's folder."""
    config = make_config(options).as_json()
    flags = ["--method", config.pop("method")]
    for name in (*SHARED, *RECIPES[options.recipe]):
        if name == "method":
            continue
        flag, value = name.replace("_", "-"), config[name]
        flags += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    resume = ["--resume"] if (folder / "run.json").exists() else []
    data = ["--model", options.model, "--data", options.data, "--seed", str(options.seed), "--threads", "1"]
    run("train", "--out", str(folder), *data, *flags, "--save-every", str(SAVE_EVERY), *resume)
    return folder / "adapter"


def prepare_rows(config: RunConfig) -> tuple[Any, list[Batch], int]:
    """The rows that minipeft would train on and those held out, and the number of steps."""
    prepared = prepare(config.model, config.data)
    model, _ = load_adapted(config, prepared.tokenizer, Alone())
    batches, held_out = pack_data(config, model, prepared, print)
    steps = set_steps(config, len(batches)).steps
    assert steps is not None
    return batches, held_out, steps


def make_inputs(batch: Batch) -> dict[str, Tensor]:
    """A row as transformers takes it: the mask 0 where a token is seen and the dtype's minimum where not."""
    positions = positions_in(batch.documents)
    seen = visible(batch.documents, positions, batch.ids.shape[1], None, True)  # [B, 1, T, T]
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return {"input_ids": batch.ids, "labels": batch.labels, "attention_mask": mask,
            "position_ids": positions}  # fmt: skip


def train_theirs(options: argparse.Namespace, folder: Path) -> Path:
    """Train on the same rows with transformers and PEFT and the same AdamW; returns the adapter's folder."""
    import peft
    import transformers

    config = make_config(options)
    batches, held_out, steps = prepare_rows(config)
    planned = dataclasses.replace(config.train, steps=steps)
    base = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    torch.manual_seed(options.seed)
    adapter = peft.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, adapter)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    checkpoint, first = folder / "checkpoint.safetensors", 0
    if checkpoint.exists():
        first = restore(checkpoint, trained, optimizer)
    folder.mkdir(parents=True, exist_ok=True)
    for step in tqdm(range(first, steps), initial=first, total=steps, mininterval=15):
        model.train()
        torch.manual_seed(derive_seed(options.seed, step, 0))  # dropout: a function of the step, as after a resume
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, planned)
        optimizer.zero_grad(set_to_none=True)
        model(**make_inputs(batches[step]), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save(checkpoint, trained, optimizer, step + 1)
    model.eval()
    losses = [evaluate(model, batch) for batch in held_out]
    result = {"steps": steps, "dev_loss": sum(loss for loss, _ in losses) / sum(n for _, n in losses)}
    (folder / "result.json").write_text(json.dumps(result))
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


@torch.no_grad()
def evaluate(model: Any, batch: Batch) -> tuple[float, int]:
    """The summed loss of a held-out row, in nats, and its supervised tokens."""
    targets = int((batch.labels[:, 1:] >= 0).sum())
    return float(model(**make_inputs(batch), use_cache=False).loss) * targets, targets


def save(path: Path, trained: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write a checkpoint beside the old one, then take its place."""
    tensors = {f"weight/{name}": p.detach() for name, p in trained.items()}
    for name, p in trained.items():
        tensors |= {f"{key}/{name}": optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq", "step")}
    save_file(tensors, path.with_suffix(".new"), {"step": str(step)})
    path.with_suffix(".new").replace(path)


def restore(path: Path, trained: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Read a checkpoint; returns the number of steps taken."""
    tensors = load_file(path)
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(tensors[f"weight/{name}"])
            optimizer.state[p] = {key: tensors[f"{key}/{name}"] for key in ("exp_avg", "exp_avg_sq", "step")}
    return int(next(iter(optimizer.state.values()))["step"])


def main() -> None:
    """Train one library with one recipe, answer the test questions, score, and write OUT/LIBRARY-RECIPE-SEED.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "test"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--library", choices=("minipeft", "peft"), required=True)
    parser.add_argument("--recipe", choices=RECIPES, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = f"{options.library}-{options.recipe}-{options.seed}"
    folder, begin = options.out / name, time.monotonic()
    adapter = (train_ours if options.library == "minipeft" else train_theirs)(options, folder)
    answers = options.out / f"{name}.jsonl"
    asked = ("--model", options.model, "--dtype", "fp32", "--data", options.test, "--threads", "1")
    run("generate", *asked, "--adapter", str(adapter), "--out", str(answers), *ANSWERS)
    row = {
        "library": options.library, "recipe": options.recipe, "seed": options.seed,
        "settings": {**SHARED, **RECIPES[options.recipe]},
        "training": json.loads((folder / "result.json").read_text()),
        "scores": json.loads(run("score", "--json", str(answers))),
        "seconds": time.monotonic() - begin,
        "versions": measure.read_versions(("torch", "transformers", "peft")),
        "command": "OMP_NUM_THREADS=1 python benchmarks/recipes.py " + " ".join(sys.argv[1:]),
    }  # fmt: skip
    (options.out / f"{name}.json").write_text(json.dumps(row, indent=1))
    print(f"{name}: BLEU {100 * row['scores']['bleu']:.1f}")


if __name__ == "__main__":
    main()
