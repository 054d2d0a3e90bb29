"""Decoding with many adapters in one batch: lora_rows against the base linear alone and HF PEFT's `adapter_names`.

    python benchmarks/decode.py
    python benchmarks/decode.py --device cuda --out benchmarks/results/lora-decode-h200.json         # 2 minutes

A batch of B rows, one token each, and 1, B/4 or B different adapters among them. PEFT loops over the adapters in
Python, so it pays for each; ours gathers (reference) or reads each row's own (decode). Errors stand by each ratio.
"""

import argparse
import dataclasses
from collections.abc import Callable

import measure
import peft
import torch
import torch.nn.functional as F
from minipeft_kernels import Call, UnavailablePath, choose_path, lora_rows
from torch import Tensor, nn


def main() -> None:
    """Measure each batch, and write and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--shape", help="KxN; on a CPU 768x768, on a GPU 4096x4096")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", help="float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="where the rows go, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    gpu = arguments.device.startswith("cuda")
    arguments.dtype = arguments.dtype or ("bfloat16" if gpu else "float32")
    k, n = map(int, (arguments.shape or ("4096x4096" if gpu else "768x768")).split("x"))
    rows: list[measure.Row] = []
    for batch in arguments.batches:
        for adapters in sorted({1, max(1, batch // 4), batch}):
            found = compare(batch, adapters, k, n, arguments)
            measure.show_rows(found)
            rows += found
    if arguments.out:
        measure.write_rows(arguments.out, rows)


def compare(batch: int, adapters: int, k: int, n: int, arguments: argparse.Namespace) -> list[measure.Row]:
    """Time one token a row for each way to compute it."""
    dtype, device, r = getattr(torch, arguments.dtype), arguments.device, arguments.rank
    random = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random, device=device)
    weight, x = (draw(n, k) / k**0.5).to(dtype), draw(batch, 1, k).to(dtype)
    A, B = (draw(adapters, r, k) / k**0.5).to(dtype), (draw(adapters, n, r) / r**0.5).to(dtype)
    owner, scales = torch.arange(batch, device=device) % adapters, torch.full((adapters,), 2.0, device=device)
    calls: dict[str, Callable[[], Tensor]] = {"base": lambda: F.linear(x, weight)}
    calls["peft, adapter_names"] = peft_call(x, weight, A, B, owner)
    for path in ("reference", "decode"):
        try:
            choose_path(path, Call(x.device, dtype, batch, k, n, r, False, False, grouped=True))
        except UnavailablePath as reason:
            if batch == arguments.batches[0]:
                print(f"# not measured: {reason}")
            continue
        calls[path] = lambda path=path: lora_rows(x, weight, None, A, B, owner, scales, path=path)
    wide = torch.float32 if x.is_cuda else torch.float64
    each = torch.stack([x[i].to(wide) @ A[j].to(wide).T @ B[j].to(wide).T for i, j in enumerate(owner.tolist())])
    exact = x.to(wide) @ weight.to(wide).T + 2.0 * each  # [B, 1, N]
    with torch.no_grad():
        errors = {name: ((call().to(wide) - exact).norm() / exact.norm()).item() for name, call in calls.items()}
        if x.is_cuda:
            calls |= {f"{name}, graph": measure.graphed(call) for name, call in calls.items() if "peft" not in name}
        found = measure.measure(
            calls, name="decode", shape=f"{batch}x{k}x{n} r{r} {adapters} adapters", dtype=arguments.dtype,
            device=device, rounds=arguments.rounds, seconds=0.01, packages=("peft", "triton"),
        )  # fmt: skip
    return [judged(row, found, errors) for row in found]


def judged(row: measure.Row, rows: list[measure.Row], errors: dict[str, float]) -> measure.Row:
    """Add to a row its error and its ratios; where the error is larger than PEFT's: FAIL, and no ratio."""
    times = {other.variant: other.median for other in rows}
    floor = times["base, graph" if row.variant.endswith("graph") else "base"]
    mine, peer = errors[row.variant.removesuffix(", graph")], errors["peft, adapter_names"]
    extra: dict[str, object] = {"times_base": row.median / floor, "error": mine, "peft_error": peer}
    extra["faster than peft"] = times["peft, adapter_names"] / row.median
    if mine > 1.25 * peer + 1e-7 and not row.variant.startswith("base"):
        return dataclasses.replace(row, ratio=0.0, note="FAIL", extra={"error": mine, "peft_error": peer})
    return dataclasses.replace(row, extra=extra)


def peft_call(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, owner: Tensor) -> Callable[[], Tensor]:
    """Return HF PEFT's linear with these adapters loaded, called with a name for each row."""
    r, (n, k) = A.shape[1], weight.shape
    model = nn.Sequential(nn.Linear(k, n, bias=False, device=x.device, dtype=x.dtype))
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"])
    wrapped = peft.get_peft_model(model, config, adapter_name="0", autocast_adapter_dtype=False)
    for i in range(1, len(A)):
        wrapped.add_adapter(str(i), config)
    layer = model[0]
    layer.base_layer.weight.data = weight
    for i in range(len(A)):
        layer.lora_A[str(i)].weight.data, layer.lora_B[str(i)].weight.data = A[i], B[i]
    wrapped.eval()
    names = [str(i) for i in owner.tolist()]
    return lambda: layer(x, adapter_names=names)


if __name__ == "__main__":
    main()
