"""Training steps of one decoder layer, GPT-2 124M and, on a GPU, a 7B: ours, HF transformers + PEFT, and frozen.

    python benchmarks/steps.py --compile --out benchmarks/results/lora-steps-cpu.json                # 6 minutes
    python benchmarks/steps.py --cases qwen3-0.6b --steps 2 --rounds 3 --dropout 0                   # 10 minutes
    python benchmarks/steps.py --device cuda --out benchmarks/results/lora-steps-h200.json
    python benchmarks/steps.py --device cuda --cases 7b --rows 1 --length 8192 --activation-checkpointing

All variants share the same random weights. A step is forward, loss, backward and AdamW on the adapters, which are
loaded from one file in PEFT's format. "frozen" is the decoder without adapters, forward and backward to the embedding.
The loss after 20 steps without dropout must equal PEFT's to 1e-3 (in bfloat16 under autocast, which casts float32
adapters for each product as ours does), else the row is a FAIL without a ratio. On a GPU a second column replays a CUDA
graph of the step, except for the 7B, whose graphs would each keep their activations.
"""

import argparse
import dataclasses
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import measure
import peft
import torch
import transformers
from lora_linear import record_graphs
from minipeft_kernels import BACKENDS, Call, UnavailableBackend, choose_backend
from torch import Tensor, nn

from minipeft import LoRAConfig, add_adapter, save_adapter
from minipeft.errors import InputError
from minipeft.models import FAMILIES, Decoder
from minipeft.models.config import parse_config
from minipeft.models.gpt2 import FAMILY as GPT2
from minipeft.models.loss import cross_entropy

Config = dict[str, Any]
MISTRAL = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
SMOL = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
ONE = {"model_type": "llama", "num_hidden_layers": 1, "vocab_size": 512, "max_position_embeddings": 8192}
WHOLE = {"model_type": "llama", "num_hidden_layers": 32, "vocab_size": 32000, "max_position_embeddings": 8192}
QWEN3 = {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
         "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
         "max_position_embeddings": 40960, "tie_word_embeddings": True,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}  # fmt: skip
LLAMA_1B = {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
            "max_position_embeddings": 8192}  # fmt: skip
CASES: dict[str, Config] = {  # name -> config.json; a single layer has a small vocabulary, whose head takes little time
    "layer": ONE | SMOL,
    "layer, GPU": ONE | MISTRAL,
    "gpt2": {"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "vocab_size": 50257},
    "7b": WHOLE | LLAMA,
    "qwen3-0.6b": QWEN3,
    "llama-1b": LLAMA_1B,
}
CPU = (("layer", 1, 256), ("gpt2", 1, 256), ("qwen3-0.6b", 1, 128))  # case, rows, tokens of a row
NAMED = ("qwen3-0.6b",)  # cases that are measured only if they are named
GPU = (("layer, GPU", 4, 2048), ("gpt2", 8, 1024), ("7b", 4, 2048))
STEPS = 20  # training steps before the losses are compared
RATE = 1e-3


@dataclass
class Trained:
    """A model and its trained parameters; `loss` returns nats per token of the batch."""

    loss: Callable[[], Tensor]
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer | None = field(default=None, repr=False)

    def step(self) -> Tensor:
        """Forward, loss, backward and AdamW; returns the loss."""
        loss = self.loss()
        loss.backward()
        if self.parameters:
            on_gpu = self.parameters[
                0
            ].is_cuda  # capturable: the step counter is on the GPU, which a CUDA graph requires
            self.optimizer = self.optimizer or torch.optim.AdamW(
                self.parameters, lr=RATE, weight_decay=0.0, capturable=on_gpu
            )
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def main() -> None:
    """Measure each case, and write and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_options(parser, rounds=7)
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all of the device but " + ", ".join(NAMED))
    parser.add_argument("--rows", type=int, help="rows of a batch (default: those of the case)")
    parser.add_argument("--length", type=int, help="tokens of a row (default: those of the case)")
    parser.add_argument("--layers", type=int, help="decoder layers (default: those of the case)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", help="dtype of the base: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--compile", action="store_true", help="PEFT and ours with torch.compile too")
    parser.add_argument("--activation-checkpointing", action="store_true", help="recompute each block in backward")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps before the losses are compared")
    options = parser.parse_args()
    gpu = options.device.startswith("cuda")
    options.dtype = options.dtype or ("bfloat16" if gpu else "float32")
    found: list[measure.Row] = []
    for threads, (case, rows, length) in itertools.product(options.threads, GPU if gpu else CPU):
        if case not in options.cases if options.cases else case in NAMED:
            continue
        torch.set_num_threads(threads)
        rows_of_case = compare(case, options.rows or rows, options.length or length, threads, options)
        measure.show_rows(rows_of_case)
        found += rows_of_case
        if options.out:
            measure.write_rows(options.out, found)
    if not found:
        raise InputError(f"{', '.join(options.cases)} is not measured on {options.device}", where="--cases")


def compare(case: str, rows: int, length: int, threads: int, options: argparse.Namespace) -> list[measure.Row]:
    """Time a step of every variant; each row holds its loss, gradient norm and the bytes saved for backward."""
    config, device = CASES[case], options.device
    if options.layers:
        config = config | {"n_layer" if config["model_type"] == "gpt2" else "num_hidden_layers": options.layers}
    weights = draw_weights(config, getattr(torch, options.dtype), device)
    random = torch.Generator(device).manual_seed(1)
    ids = torch.randint(config["vocab_size"], (rows, length), generator=random, device=device)  # [B, T]
    own = {weight.data_ptr() for weight in weights.values()}
    checks: dict[str, tuple[float, float]] = {}
    found = []
    for dropout in (
        0.0,
        *(p for p in options.dropout if p),
    ):  # PEFT draws other masks: losses are compared without dropout
        torch.compiler.reset()
        variants = make_variants(config, weights, ids, dropout, options)
        if not dropout:
            checks = {name: after(variant, options.steps) for name, variant in variants.items() if variant.parameters}
        if dropout not in options.dropout:
            continue
        kept = {name: count_kept_bytes(variant, own) for name, variant in variants.items() if "compiled" not in name}
        steps: dict[str, Callable[[], object]] = {name: variant.step for name, variant in variants.items()}
        if ids.is_cuda and case != "7b":
            steps |= record_graphs(steps, 1)
        note = f"dropout {dropout}" + ", checkpointing" * options.activation_checkpointing
        measured = measure.measure(
            steps,
            name=f"step {case}",
            shape=f"{rows}x{length} r{options.rank}",
            dtype=options.dtype,
            device=device,
            rounds=options.rounds,
            warmups=1,
            threads=threads,
            busy=options.busy,
            packages=("peft", "transformers", "triton"),
            note=note,
        )
        found += [judge(row, kept, checks, rows * length) for row in measured]
    return found


def make_variants(
    config: Config, weights: dict[str, Tensor], ids: Tensor, dropout: float, options: argparse.Namespace
) -> dict[str, Trained]:
    """Return the frozen decoder, PEFT's variants and the available backends, by name."""
    variants = {"frozen": frozen(decoder(config, weights), ids, options)}
    with tempfile.TemporaryDirectory() as start:
        model = decoder(config, weights)
        add_adapter(model, LoRAConfig(options.rank, 2.0 * options.rank, dropout))
        save_adapter(model, start)
        variants["peft, same dtype"] = theirs(config, weights, start, ids, False, options)
        if options.dtype != "float32":  # in float32 the three are the same
            variants["peft, default"] = theirs(config, weights, start, ids, True, options)
            variants["peft, autocast"] = theirs(config, weights, start, ids, True, options, autocast=True)
        if options.compile:
            variants["peft, compiled"] = theirs(config, weights, start, ids, False, options, compiled=True)
    for backend in find_backends(model, ids, options.rank, dropout):
        variants[backend] = ours(config, weights, backend, ids, dropout, options)
    if options.compile:
        variants["ours, compiled"] = ours(config, weights, "auto", ids, dropout, options, compiled=True)
    return variants


def judge(row: measure.Row, kept: dict[str, int], checks: dict[str, tuple[float, float]], tokens: int) -> measure.Row:
    """Add the checks and ratios to a row; if the loss differs from PEFT's, the row is a FAIL without a ratio."""
    variant, graph, _ = row.variant.partition(", graph")
    extra: dict[str, object] = {"kept_bytes": kept.get(variant)}
    if variant in checks:
        (loss, norm), (theirs, _) = checks[variant], checks.get("peft, autocast", checks["peft, same dtype"])
        extra |= {"loss_after_20_steps": loss, "peft_loss": theirs, "gradient_norm": norm}
        if (abs(loss - theirs) > 1e-3 * theirs and "peft" not in variant) or not norm > 0:
            return dataclasses.replace(row, ratio=0.0, note=f"{row.note}; FAIL".removeprefix("; "), extra=extra)
    extra |= {"times_frozen": 1 / row.ratios[f"frozen{graph}"], "tokens_per_second": tokens / row.median}
    extra |= {f"faster than {name}": measure.compare_speed(row, name) for name in row.ratios if "peft" in name}
    return dataclasses.replace(row, extra=extra)


def draw_weights(config: Config, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Draw random weights, as a state dict."""
    of, module = FAMILIES[config["model_type"]].config, FAMILIES[config["model_type"]].decoder
    with torch.device("meta"):
        model = module(parse_config(of, config)).to(dtype)
    model.to_empty(device=device).initialize(torch.Generator(device).manual_seed(0))
    return model.state_dict()


def decoder(config: Config, weights: dict[str, Tensor]) -> Decoder:
    """Return a decoder that uses these weights without a copy."""
    of, module = FAMILIES[config["model_type"]].config, FAMILIES[config["model_type"]].decoder
    with torch.device("meta"):
        model = module(parse_config(of, config))
    model.load_state_dict(weights, assign=True)
    model.lm_head.weight = model.embedding.weight if model.config.tie_word_embeddings else model.lm_head.weight
    return model.requires_grad_(False).train()


def find_backends(model: Decoder, ids: Tensor, rank: int, dropout: float) -> list[str]:
    """Return the backends that can train on this device and dtype."""
    weight, width = model.embedding.weight, model.config.width
    found = []
    for backend in BACKENDS:
        try:
            choose_backend(
                backend, Call(weight.device, weight.dtype, ids.numel(), width, width, rank, dropout > 0, True)
            )
        except UnavailableBackend as reason:
            print(f"# not measured: {reason}")
            continue
        found += [backend] if backend != "decode" else []
    return found


def ours(
    config: Config,
    weights: dict[str, Tensor],
    backend: str,
    ids: Tensor,
    dropout: float,
    options: argparse.Namespace,
    compiled: bool = False,
) -> Trained:
    """Return minipeft's model on one backend, or compiled as one graph."""
    model = decoder(config, weights)
    add_adapter(model, LoRAConfig(options.rank, 2.0 * options.rank, dropout, backend=backend))
    model.activation_checkpointing = options.activation_checkpointing
    trained = [p for p in model.parameters() if p.requires_grad]
    if compiled:
        loss = torch.compile(model.loss, fullgraph=True, dynamic=False)
        return Trained(lambda: loss(ids, ids) / ids[:, 1:].numel(), trained)
    return Trained(lambda: compute_loss(model, ids), trained)


def frozen(model: Decoder, ids: Tensor, options: argparse.Namespace) -> Trained:
    """Return the decoder without adapters; backward reaches the embedding."""
    model.activation_checkpointing = options.activation_checkpointing
    model.embedding.register_forward_hook(lambda module, given, x: x.requires_grad_())
    return Trained(lambda: compute_loss(model, ids), [])


def compute_loss(model: Decoder, ids: Tensor) -> Tensor:
    """Return the loss in nats per token."""
    return cross_entropy(model.hidden(ids), model.lm_head.weight, ids) / ids[:, 1:].numel()


def theirs(
    config: Config,
    weights: dict[str, Tensor],
    start: str,
    ids: Tensor,
    upcast: bool,
    options: argparse.Namespace,
    autocast: bool = False,
    compiled: bool = False,
) -> Trained:
    """Return transformers and PEFT on the same weights with the adapters in `start`, in float32 if `upcast`."""
    with torch.device(options.device):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config), dtype=getattr(torch, options.dtype)
        )
    turned = {name: w.T if name.endswith(GPT2.transposed) else w for name, w in weights.items()}
    given = {name: nn.Parameter(w, requires_grad=False) for name, w in turned.items()}
    wrong = model.load_state_dict(given, assign=True, strict=False)
    assert not wrong.unexpected_keys, wrong
    assert set(wrong.missing_keys) <= {"lm_head.weight"}, wrong  # tied
    model.tie_weights()
    model.config.use_cache = False
    if options.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model = peft.PeftModel.from_pretrained(model, start, is_trainable=True, autocast_adapter_dtype=upcast).train()

    call = torch.compile(model, dynamic=False) if compiled else model

    def loss() -> Tensor:
        with torch.autocast(ids.device.type, getattr(torch, options.dtype), enabled=autocast):
            return call(input_ids=ids, labels=ids).loss

    return Trained(loss, [p for p in model.parameters() if p.requires_grad])


def after(variant: Trained, steps: int) -> tuple[float, float]:
    """Return the loss after some steps, and the norm of the adapters' gradient."""
    for _ in range(steps):
        variant.step()
    loss = variant.loss()
    gradients = torch.autograd.grad(loss, variant.parameters)
    return loss.item(), torch.stack([g.float().norm() for g in gradients]).norm().item()


def count_kept_bytes(variant: Trained, own: set[int]) -> int:
    """Return the bytes that forward saves for backward without the weights, each storage once."""
    own = own | {p.data_ptr() for p in variant.parameters}
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = variant.loss()
    del loss
    return sum(size for place, size in kept.items() if place not in own)


if __name__ == "__main__":
    main()
