"""Decoding with many adapters in one batch: lora_rows against the base linear alone and HF PEFT's `adapter_names`.

    python benchmarks/decode.py
    python benchmarks/decode.py --device cuda --out benchmarks/results/lora-decode-h200.json

A batch has B rows of one token and 1, B/4 or B different adapters; a round is 128 steps, and times are per step. PEFT
loops over the adapters in Python; ours groups the rows (reference) or reads each row's adapter (decode). On a GPU the
steps cycle through several layers, as in a model, so that no weight stays in the L2 cache, and a second column replays
CUDA graphs. Each row holds its error against float64 (float32 on a GPU). For whole generations see benchmarks/bank.py.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import measure
import peft
import torch
import torch.nn.functional as F
from lora_linear import record_graphs, relative
from minipeft_kernels import Call, UnavailableBackend, choose_backend, lora_rows
from torch import Tensor, nn

STEPS = 128  # a round


@dataclass(frozen=True)
class Layer:
    """A linear with its adapters, and the input token of each row."""

    x: Tensor  # [B, 1, K]
    weight: Tensor  # [N, K]
    A: Tensor  # [adapters, r, K]
    B: Tensor  # [adapters, N, r]
    owner: Tensor  # [B], the adapter of each row
    scales: Tensor  # [adapters]


def main() -> None:
    """Measure each batch, and write and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser, rounds=11)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--shape", help="KxN; on a CPU 768x768, on a GPU 4096x4096")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", help="float32 on a CPU, bfloat16 on a GPU")
    arguments = parser.parse_args()
    gpu = arguments.device.startswith("cuda")
    arguments.dtype = arguments.dtype or ("bfloat16" if gpu else "float32")
    k, n = map(int, (arguments.shape or ("4096x4096" if gpu else "768x768")).split("x"))
    rows: list[measure.Row] = []
    for threads, batch in itertools.product(arguments.threads, arguments.batches):
        torch.set_num_threads(threads)
        for adapters in sorted({1, max(1, batch // 4), batch}):
            found = compare(draw_layers(batch, adapters, k, n, arguments), threads, arguments)
            measure.show_rows(found)
            rows += found
            if arguments.out:
                measure.write_rows(arguments.out, rows)


def draw_layers(batch: int, adapters: int, k: int, n: int, arguments: argparse.Namespace) -> list[Layer]:
    """Draw more layers than a GPU's L2 cache holds; one on a CPU."""
    dtype, device, r = getattr(torch, arguments.dtype), arguments.device, arguments.rank
    random = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random, device=device)
    owner, scales = torch.arange(batch, device=device) % adapters, torch.full((adapters,), 2.0, device=device)
    return [
        Layer(
            x=draw(batch, 1, k).to(dtype),
            weight=(draw(n, k) / k**0.5).to(dtype),
            A=(draw(adapters, r, k) / k**0.5).to(dtype),
            B=(draw(adapters, n, r) / r**0.5).to(dtype),
            owner=owner,
            scales=scales,
        )
        for _ in range(measure.count_input_sets(k * n * dtype.itemsize, device))
    ]


@torch.no_grad()
def compare(layers: list[Layer], threads: int, arguments: argparse.Namespace) -> list[measure.Row]:
    """Time a step of each variant."""
    first = layers[0]
    truth = exact(first)
    ways: dict[str, Callable[[Layer], Callable[[], Tensor]]] = {
        "base": lambda layer: lambda: F.linear(layer.x, layer.weight),
        "peft, adapter_names": make_peft_call,
    }
    for backend in find_backends(first):
        ways[backend] = lambda layer, backend=backend: lambda: ours(layer, backend)
    calls = {name: alternate([way(layer) for layer in layers]) for name, way in ways.items()}
    errors = {name: relative(way(first)(), truth) for name, way in ways.items()}
    if first.x.is_cuda:
        recorded = {
            name: call for name, call in calls.items() if "peft" not in name
        }  # PEFT synchronizes, which a graph cannot capture
        calls |= record_graphs(recorded, len(layers))
    (batch, _, k), (adapters, n, r) = first.x.shape, first.B.shape
    found = measure.measure(
        calls,
        name="decode",
        shape=f"{batch}x{k}x{n} r{r} {adapters} adapters",
        dtype=arguments.dtype,
        device=arguments.device,
        rounds=arguments.rounds,
        calls=STEPS,
        threads=threads,
        busy=arguments.busy,
        packages=("peft", "triton"),
    )
    return [judge(row, errors) for row in found]


def judge(row: measure.Row, errors: dict[str, float]) -> measure.Row:
    """Add the error and ratios to a row; if the error is above 1.25 times PEFT's, the row is a FAIL without a ratio."""
    variant, graph, _ = row.variant.partition(", graph")
    extra: dict[str, object] = {"times_base": 1 / row.ratios[f"base{graph}"]}
    if variant == "base":  # not comparable: it has no adapters
        return dataclasses.replace(row, extra=extra)
    checked = {"error": errors[variant], "peft_error": errors["peft, adapter_names"]}
    if checked["error"] > 1.25 * checked["peft_error"] + 1e-7:
        return dataclasses.replace(row, ratio=0.0, note="FAIL", extra=dict(checked))
    extra["faster than peft"] = measure.compare_speed(row, "peft, adapter_names")
    return dataclasses.replace(row, extra=extra | checked)


def find_backends(layer: Layer) -> list[str]:
    """Return the backends of lora_rows that can run on this device and dtype."""
    (batch, _, k), (_, n, r) = layer.x.shape, layer.B.shape
    call, found = Call(layer.x.device, layer.x.dtype, batch, k, n, r, False, False, grouped=True), []
    for backend in ("reference", "decode"):
        try:
            found.append(choose_backend(backend, call))
        except UnavailableBackend as reason:
            if batch == 1:
                print(f"# not measured: {reason}")
    return found


def alternate(calls: list[Callable[[], Tensor]]) -> Callable[[], Tensor]:
    """Return a function that calls these in turn."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def exact(layer: Layer) -> Tensor:
    """Return y = x W^T + scale x A^T B^T, row by row, in float64 (float32 on a GPU)."""
    wide = torch.float32 if layer.x.is_cuda else torch.float64
    x, weight, A, B = (t.to(wide) for t in (layer.x, layer.weight, layer.A, layer.B))
    each = torch.stack([x[i] @ A[j].T @ B[j].T for i, j in enumerate(layer.owner.tolist())])  # [B, 1, N]
    return x @ weight.T + layer.scales[0] * each  # [B, 1, N]


def ours(layer: Layer, backend: str) -> Tensor:
    """Return lora_rows of a layer."""
    return lora_rows(layer.x, layer.weight, None, layer.A, layer.B, layer.owner, layer.scales, backend=backend)


def make_peft_call(layer: Layer) -> Callable[[], Tensor]:
    """Return HF PEFT's linear with these adapters loaded, called with a name for each row."""
    r, (n, k) = layer.A.shape[1], layer.weight.shape
    model = nn.Sequential(nn.Linear(k, n, bias=False, device=layer.x.device, dtype=layer.x.dtype))
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"])
    wrapped = peft.get_peft_model(model, config, adapter_name="0", autocast_adapter_dtype=False)
    for i in range(1, len(layer.A)):
        wrapped.add_adapter(str(i), config)
    linear = model[0]
    linear.base_layer.weight.data = layer.weight
    for i in range(len(layer.A)):
        linear.lora_A[str(i)].weight.data, linear.lora_B[str(i)].weight.data = layer.A[i], layer.B[i]
    wrapped.eval()
    names = [str(i) for i in layer.owner.tolist()]
    return lambda: linear(layer.x, adapter_names=names)


if __name__ == "__main__":
    main()
