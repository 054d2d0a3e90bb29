"""How a merged weight is rounded to bfloat16 or float16: does another way than to nearest halve the KL?

    python benchmarks/merge_rounding.py [--assets DIR] [--real MODEL_FOLDER] [--out results/merge-rounding/report.md]

W* = W + s B A, in float32, rounded to W_q:

    nearest      W_q = round(W*)
    multiplier   W_q = round(W + c s B A), c in [0.8, 1.6] of least |W_q - W*|, one for each tensor
    row          the error of an entry is added to the next one of its row before that is rounded
    inputs       the same with the weights that keep |X (W_q - W*)^T| least (Frantar et al. 2022, "GPTQ", eq. 2-3),
                 X the linear's inputs on prompts that the KL is not measured on

Two KL, in nats per token, each of the unmerged model against the merged: `run` in the dtype that the model is run in,
where every product rounds too; `weights` with float32 arithmetic, where the merged weights alone are rounded.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from measure import command, commit
from torch import Tensor

import minipeft
from minipeft.adapters import IA3Config, LoRAConfig, VeRAConfig, merge_adapter, remove_adapter
from minipeft.adapters.verdict import divergence
from minipeft.data.templates import prompt_text
from minipeft.models import FAMILIES, Decoder

ADAPTERS = {"LoRA r16": LoRAConfig(16), "LoRA r4": LoRAConfig(4, 8.0), "rsLoRA": LoRAConfig(16, rslora=True),
            "DoRA": LoRAConfig(8, dora=True), "PiSSA": LoRAConfig(8, init="pissa"), "(IA)3": IA3Config(),
            "VeRA": VeRAConfig(64)}  # fmt: skip
SHAPE = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
RANDOM = {"gpt2": {"vocab_size": 257, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}} | dict.fromkeys(
    ("llama", "qwen3", "granite", "olmo2"), SHAPE
)
TEXTS = 16  # of each model: the first half for the inputs, the second to measure on
Case = tuple[str, Decoder, list[Tensor]]
Figures = tuple[float, float, float]  # KL as run, KL of the weights, share of changed top-1 tokens


def nearest(old: Tensor, new: Tensor, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    return new.to(dtype).float()


def multiplier(old: Tensor, new: Tensor, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    tried = [(old + c * (new - old)).to(dtype).float() for c in torch.linspace(0.8, 1.6, 17).tolist()]
    return min(tried, key=lambda w: (w - new).square().sum().item())


def row(old: Tensor, new: Tensor, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    rounded, carry = torch.empty_like(new), torch.zeros_like(new[:, 0])
    for i in range(new.shape[1]):
        wanted = new[:, i] + carry
        rounded[:, i] = wanted.to(dtype).float()
        carry = wanted - rounded[:, i]
    return rounded


def inputs(old: Tensor, new: Tensor, inputs: Tensor, dtype: torch.dtype, block: int = 64) -> Tensor:
    gram = inputs.double().T @ inputs.double()  # [in, in]
    gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    upper = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True).float()
    left, rounded = new.clone(), torch.empty_like(new)
    for start in range(0, new.shape[1], block):
        errors = []
        for i in range(start, stop := min(new.shape[1], start + block)):
            rounded[:, i] = left[:, i].to(dtype).float()
            errors.append((left[:, i] - rounded[:, i]) / upper[i, i])
            left[:, i + 1 : stop] -= errors[-1][:, None] * upper[i, i + 1 : stop]
        left[:, stop:] -= torch.stack(errors, 1) @ upper[start:stop, stop:]
    return rounded


WAYS: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (nearest, multiplier, row, inputs)}


@torch.no_grad()
def compare(
    unmerged: Decoder, weights: dict[str, Tensor], rows: list[Tensor], dtype: torch.dtype
) -> tuple[float, float]:
    """Mean KL and the share of changed top-1 tokens, both models run in `dtype`."""
    ours, merged = copy.deepcopy(unmerged).to(dtype), copy.deepcopy(unmerged).to(dtype)
    remove_adapter(merged)
    for path, weight in weights.items():
        merged.get_parameter(path).copy_(weight)
    pairs = [(ours(ids[None])[0], merged(ids[None])[0]) for ids in rows]
    kl = torch.cat([divergence(p, q) for p, q in pairs])
    changed = torch.cat([p.argmax(-1) != q.argmax(-1) for p, q in pairs])
    return kl.mean().item(), changed.float().mean().item()


@torch.no_grad()
def study(model: Decoder, rows: list[Tensor], dtype: torch.dtype) -> dict[str, Figures]:
    """What each way of rounding costs; `model` is adapted, in float32, its weights as `dtype` holds them."""
    plain = copy.deepcopy(model)
    old = {name: p.clone() for name, p in plain.named_parameters()}
    merge_adapter(plain)
    new = {name: p for name, p in plain.named_parameters() if not torch.equal(p, old[name])}
    seen: dict[str, list[Tensor]] = {}
    for name in new:
        if name.endswith(".weight"):
            keep = lambda module, given, name=name: seen.setdefault(name, []).append(given[0].flatten(0, -2))
            plain.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(keep)
    half = len(rows) // 2
    for ids in rows[:half]:
        plain(ids[None])
    found = {}
    for way, rounding in WAYS.items():
        weights = {n: rounding(old[n], w, torch.cat(seen[n]), dtype) if w.ndim == 2 else w for n, w in new.items()}
        run, changed = compare(model, weights, rows[half:], dtype)
        found[way] = (run, compare(model, weights, rows[half:], torch.float32)[0], changed)
    return found


def on_grid(model: Decoder, dtype: torch.dtype) -> Decoder:
    """The same model in float32, each weight as `dtype` holds it."""
    return model.to(dtype).float()


def trained(source: str, data: str | Path, steps: int, names: tuple[str, ...], dtype: torch.dtype) -> Iterator[Case]:
    """Adapters that a few steps trained, each with texts to measure on."""
    tokenizer, pairs = minipeft.load_tokenizer(source), minipeft.load_pairs(data)
    texts = [prompt_text(pair.intent) + pair.snippet for pair in pairs.items[-TEXTS:]]
    rows = [torch.tensor(tokenizer.encode(text))[:96] for text in texts]
    examples = minipeft.encode_pairs(pairs.items[: 4 * steps], tokenizer)
    batches = minipeft.pack(examples, tokenizer, length=192, batch=1)
    for name in names:
        model = on_grid(minipeft.load_model(source), dtype)
        minipeft.add_adapter(model, ADAPTERS[name])
        for _ in minipeft.train(model, batches, minipeft.TrainConfig(steps=steps, learning_rate=2e-3)):
            pass
        yield f"{Path(source).name}, {name}", model.eval(), rows


def drawn(dtype: torch.dtype) -> Iterator[Case]:
    """Random models of several families with a random LoRA."""
    for number, (family, shape) in enumerate(RANDOM.items()):
        draw = torch.Generator().manual_seed(number)
        model = FAMILIES[family].decoder(FAMILIES[family].config(**shape))
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.normal_(0, 0.1, generator=draw).add_(p.ndim == 1 and name.endswith("weight"))
        on_grid(model, dtype)
        minipeft.add_adapter(model, LoRAConfig(8))
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.data.normal_(0, 0.02, generator=draw)
        rows = [torch.randint(0, 257, (64,), generator=draw) for _ in range(TEXTS)]
        yield f"random {family}, LoRA r8", model.eval(), rows


def table(rows: list[tuple[str, str, dict[str, Figures]]]) -> str:
    """The figures as Markdown, and what follows from them."""
    heads = [f"{way} {kind}" for kind in ("run", "weights", "top-1") for way in WAYS]
    lines = [f"| adapter | dtype | {' | '.join(heads)} |", "|---|---|" + "---:|" * len(heads)]
    for name, dtype, found in rows:
        cells = [f"{found[way][i]:.1e}" if i < 2 else f"{found[way][i]:.2%}" for i in range(3) for way in WAYS]
        lines.append(f"| {name} | {dtype} | {' | '.join(cells)} |")
    lines.append("")
    for way in WAYS:
        for i, kind in enumerate(("run", "weights")):
            ratios = [found[way][i] / found["nearest"][i] for _, _, found in rows]
            halved = sum(ratio <= 0.5 for ratio in ratios)
            lines.append(
                f"- {way}, KL {kind}: median {statistics.median(ratios):.2f} of nearest, halved in {halved} of {len(rows)}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--assets", type=Path, help="folder with data/conala and fixtures/stories260K")
    parser.add_argument("--real", help="folder of SmolLM2-135M-Instruct; takes minutes")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[tuple[str, str, dict[str, Figures]]] = []
    for dtype in (torch.bfloat16, torch.float16):
        cases = [drawn(dtype), trained("demo", "demo", 12, tuple(ADAPTERS), dtype)]
        if options.assets:
            conala, stories = (
                options.assets / part for part in ("data/conala/conala-paired-train.json", "fixtures/stories260K")
            )
            cases.append(trained(str(stories), conala, 20, tuple(ADAPTERS), dtype))
            if options.real and dtype == torch.bfloat16:
                cases.append(trained(options.real, conala, 6, ("LoRA r16",), dtype))
        for name, model, texts in (case for several in cases for case in several):
            rows.append((name, str(dtype).removeprefix("torch."), study(model, texts, dtype)))
            print(table(rows[-1:]).splitlines()[2], flush=True)
    text = (
        f"# Rounding of merged weights\n\n    {command()}\n\n{len(rows)} adapters, commit {commit()}\n\n{table(rows)}\n"
    )
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
