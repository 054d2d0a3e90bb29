"""How a merged weight is rounded to bfloat16 or float16: does another way than to nearest halve the KL?

    python benchmarks/merge_rounding.py [--assets DIR] [--real DIR] > results/merge-rounding/report.md

W* = W + s B A, in float32, rounded to W_q:

    nearest      W_q = round(W*)
    multiplier   W_q = round(W + c s B A), c in [0.8, 1.6] of least |W_q - W*|, one for each tensor
    row          the error of an entry is added to the next one of its row before that is rounded
    inputs       the same with the weights that keep |X (W_q - W*)^T| least (Frantar et al. 2022, "GPTQ", eq. 2-3),
                 X the linear's inputs on prompts that the KL is not measured on

Two KL, in nats per token, each of the unmerged model against the merged: `run` in the dtype that the model is run in,
where every product rounds too; `weights` with float32 arithmetic, where the merged weights alone are rounded. `top-1`
is the share of tokens that the first changes.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import minipeft
from minipeft.adapters import IA3Config, LoRAConfig, VeRAConfig, merge_adapter, remove_adapter
from minipeft.adapters.verdict import compute_divergence
from minipeft.data.templates import format_prompt
from minipeft.models import FAMILIES, Decoder

ADAPTERS = {"LoRA r16": LoRAConfig(16), "LoRA r4": LoRAConfig(4, 8.0), "rsLoRA": LoRAConfig(16, rslora=True),
            "DoRA": LoRAConfig(8, dora=True), "PiSSA": LoRAConfig(8, init="pissa"), "(IA)3": IA3Config(),
            "VeRA": VeRAConfig(64)}  # fmt: skip
SHAPE = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
RANDOM = {"gpt2": {"vocab_size": 257, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128},
          "llama": SHAPE, "qwen3": SHAPE, "granite": SHAPE, "olmo2": SHAPE}  # fmt: skip
TEXTS = 16  # of each model: the first half for the inputs, the second to measure on
Case = tuple[str, Decoder, list[Tensor]]  # a model in float32, each base weight as the dtype holds it


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
    adapted: Decoder, weights: dict[str, Tensor], rows: list[Tensor], dtype: torch.dtype
) -> tuple[float, float]:
    """Mean KL, and the share of changed top-1 tokens, both models run in `dtype`."""
    unmerged, merged = copy.deepcopy(adapted).to(dtype), copy.deepcopy(adapted).to(dtype)
    remove_adapter(merged)
    for path, weight in weights.items():
        merged.get_parameter(path).copy_(weight)
    pairs = [(unmerged(ids[None])[0], merged(ids[None])[0]) for ids in rows]
    changed = torch.cat([p.argmax(-1) != q.argmax(-1) for p, q in pairs])
    return torch.cat([compute_divergence(p, q) for p, q in pairs]).mean().item(), changed.float().mean().item()


@torch.no_grad()
def study(model: Decoder, rows: list[Tensor], dtype: torch.dtype) -> list[str]:
    """The figures of a row of the table: `run`, `weights` and `top-1` of each way."""
    plain, seen = copy.deepcopy(model), {}  # type: ignore[var-annotated]
    old = {name: p.clone() for name, p in plain.named_parameters()}
    merge_adapter(plain)
    new = {name: p for name, p in plain.named_parameters() if not torch.equal(p, old[name])}
    for name in (name for name in new if name.endswith(".weight")):
        keep = lambda module, given, name=name: seen.setdefault(name, []).append(given[0].flatten(0, -2))
        plain.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(keep)
    for ids in rows[: TEXTS // 2]:
        plain(ids[None])
    found = []
    for way in WAYS.values():
        weights = {n: way(old[n], w, torch.cat(seen[n]), dtype) if w.ndim == 2 else w for n, w in new.items()}
        run, changed = compare(model, weights, rows[TEXTS // 2 :], dtype)
        found.append(
            (f"{run:.1e}", f"{compare(model, weights, rows[TEXTS // 2 :], torch.float32)[0]:.1e}", f"{changed:.2%}")
        )
    return [figures[i] for i in range(3) for figures in found]


def trained(source: str, data: str | Path, steps: int, names: tuple[str, ...], dtype: torch.dtype) -> Iterator[Case]:
    """Adapters that a few steps trained, each with texts to measure on."""
    tokenizer, pairs = minipeft.load_tokenizer(source), minipeft.load_pairs(data)
    texts = [format_prompt(pair.intent) + pair.snippet for pair in pairs.items[-TEXTS:]]
    examples = minipeft.encode_pairs(pairs.items[: 4 * steps], tokenizer)
    batches = minipeft.pack(examples, tokenizer, length=192, batch=1)
    for name in names:
        model = minipeft.load_model(source).to(dtype).float()
        minipeft.add_adapter(model, ADAPTERS[name])
        list(minipeft.train(model, batches, minipeft.TrainConfig(steps=steps, learning_rate=2e-3)))
        rows = [torch.tensor(tokenizer.encode(text))[:96] for text in texts]
        yield f"{Path(source).name}, {name}", model.eval(), rows


def drawn(dtype: torch.dtype) -> Iterator[Case]:
    """Random models of several families with a random LoRA."""
    for number, (family, shape) in enumerate(RANDOM.items()):
        draw = torch.Generator().manual_seed(number)
        model = FAMILIES[family].decoder(FAMILIES[family].config(**shape))
        for name, p in model.named_parameters():
            p.data.normal_(0, 0.1, generator=draw).add_(p.ndim == 1 and name.endswith("weight"))
        minipeft.add_adapter(model.to(dtype).float(), LoRAConfig(8))
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.data.normal_(0, 0.02, generator=draw)
        rows = [torch.randint(0, 257, (64,), generator=draw) for _ in range(TEXTS)]
        yield f"random {family}, LoRA r8", model.eval(), rows


def summary(rows: list[list[str]]) -> Iterator[str]:
    """What follows from the rows of the table: each way's KL against that of rounding to nearest."""
    for i, (kind, way) in enumerate(itertools.product(("run", "weights"), WAYS), 2):
        ratios = [float(row[i]) / float(row[2 if kind == "run" else 2 + len(WAYS)]) for row in rows]
        halved = f"halved in {sum(ratio <= 0.5 for ratio in ratios)} of {len(rows)}"
        yield f"- {way}, KL {kind}: median {statistics.median(ratios):.2f} times that of nearest, {halved}"
    changed = sum(float(row[2 + 2 * len(WAYS)].rstrip("%")) > 0.1 for row in rows)
    yield f"- nearest changes more than 0.1 % of the top-1 tokens in {changed} of {len(rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--assets", type=Path, help="folder with data/conala and fixtures/stories260K")
    parser.add_argument("--real", help="folder of SmolLM2-135M-Instruct; takes half an hour")
    options = parser.parse_args()
    torch.set_num_threads(1)
    heads = [f"{way}, {kind}" for kind in ("run", "weights", "top-1") for way in WAYS]
    print(f"# Rounding of merged weights\n\n{__doc__}\n| adapter | dtype | {' | '.join(heads)} |")
    print("|---|---|" + "---:|" * len(heads), flush=True)
    rows = []
    for dtype in (torch.bfloat16, torch.float16):
        cases = [drawn(dtype), trained("demo", "demo", 12, tuple(ADAPTERS), dtype)]
        if options.assets:
            conala = options.assets / "data/conala/conala-paired-train.json"
            stories = str(options.assets / "fixtures/stories260K")
            cases.append(trained(stories, conala, 20, tuple(ADAPTERS), dtype))
            if options.real and dtype == torch.bfloat16:
                cases.append(trained(options.real, conala, 6, ("LoRA r16",), dtype))
        for name, model, texts in itertools.chain(*cases):
            rows.append([name, str(dtype).removeprefix("torch."), *study(model, texts, dtype)])
            print(f"| {' | '.join(rows[-1])} |", flush=True)
    print("", *summary(rows), sep="\n")


if __name__ == "__main__":
    main()
