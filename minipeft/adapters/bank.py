"""Many LoRA adapters on one base, one for each row of a batch, or none: for inference (as Sheng et al. 2023, S-LoRA).

    y[b] = x[b] W^T + (x[b] A_j^T) (s_j B_j)^T        j the adapter of row b; W is read once for all rows

    bank = AdapterBank(model)
    bank.load("fr", "adapters/fr");  bank.load("de", "adapters/de")
    with bank.use(["fr", None, "de", "fr"]):         four rows; generate(..., adapters=[...]) does this
        logits = model(ids)
    bank.close()                                     a plain model again

An adapter takes the memory of its A and B, in the base's dtype; the base is not changed. For a batch, its adapters are
stacked once, padded with zeros to the largest rank, and the rows are grouped by adapter (minipeft_kernels/rows.py), so
that a linear takes three products for any number of adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from minipeft.adapters import LORA, check_empty, find_method
from minipeft.adapters.lora import RowGroups, choose_ranks, compute_scale, group_rows, lora_rows
from minipeft.adapters.peft_format import read_adapter
from minipeft.adapters.peft_targets import ROOT
from minipeft.adapters.surgery import replace, restore
from minipeft.adapters.targets import list_linears
from minipeft.errors import InputError, check_items, check_kind, check_path
from minipeft.models import Decoder
from minipeft.models.products import linear as base_product

Pair = tuple[Tensor, Tensor]  # A [r, K] and s B [N, r]


class BankLinear(nn.Module):
    """A linear that adds the update of each row's adapter. AdapterBank.use sets `stack` and `rows` for a batch."""

    adopts_linear = True

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.stack: Pair | None = None  # [n, r, K], [n, N, r]
        self.rows: RowGroups | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.stack is None or self.rows is None:
            return base_product(x, self.weight, self.bias)
        rows = self.rows.owner.shape[0]
        if rows != x.shape[0]:
            raise InputError(f"{rows} adapters were named for a batch of {x.shape[0]} rows", where="adapters")
        return lora_rows(x, self.weight, self.bias, *self.stack, self.rows)  # [B, T, N]

    def extra_repr(self) -> str:
        out, width = self.weight.shape
        return f"in={width}, out={out}, bias={self.bias is not None}"


class AdapterBank:
    """Adapters by name on one base; until `close` the bank is the model's adapter, and the model stays frozen."""

    def __init__(self, model: Decoder):
        """Replace every linear of the blocks by a BankLinear.

        Raises:
            InputError: the model holds an adapter.
        """
        check_kind(model, Decoder, "model")
        check_empty(model)
        self.model = model
        self.adapters: dict[str, dict[str, Pair]] = {}
        self.layers = {path: BankLinear(model.get_submodule(path)) for path in list_linears(model)}  # type: ignore[arg-type]
        self.trained = {name for name, p in model.named_parameters() if p.requires_grad}
        self.owner: list[int] = []  # of the batch in use
        for path, layer in self.layers.items():
            replace(model, path, layer.train(model.training))
        for p in model.parameters():
            p.requires_grad_(False)
        model.adapter = self

    def __repr__(self) -> str:
        return f"AdapterBank({', '.join(self.adapters) or 'empty'})"

    def load(self, name: str, folder: str | Path) -> None:
        """Load the LoRA adapter in `folder` under `name`.

        Raises:
            InputError: the name is taken; the adapter does not fit this base; it is not plain LoRA.
        """
        check_kind(name, str, "name")
        folder = check_path(folder, "folder")
        if name in self.adapters:
            raise InputError(f"the bank holds {name!r} already", where="bank", hint=f"bank.drop({name!r}) first")
        config, tensors, _ = read_adapter(self.model, folder)
        method = find_method(config)
        if method is not LORA:
            raise InputError(f"holds {method.label}; a bank takes plain LoRA", file=folder)
        if config.dora or config.lora_bias:
            raise InputError("holds LoRA with dora or lora_bias; a bank takes plain LoRA", file=folder)
        if not config.is_plain or any(path not in self.layers for path in choose_ranks(self.model, config)):
            problem = "holds parts of the base, or LoRA of embedding or head; a bank takes LoRA of the blocks' linears"
            raise InputError(problem, file=folder)
        if config.init != "uniform":
            hint = "Convert it to the equal plain LoRA with load_adapter and save_adapter"
            raise InputError(f"holds LoRA with init {config.init!r}; a bank takes plain LoRA", file=folder, hint=hint)
        pairs = {}
        for path, (rank, alpha) in choose_ranks(self.model, config).items():
            weight, scale = self.layers[path].weight, compute_scale(config, rank, alpha)
            A, B = (tensors[f"{ROOT}{path}.lora_{letter}.weight"] for letter in "AB")
            pairs[path] = tuple(t.to(weight.device, weight.dtype, copy=True) for t in (A, scale * B))
        self.adapters[name] = pairs  # type: ignore[assignment]

    def drop(self, name: str) -> None:
        """Remove an adapter and free its memory."""
        check_kind(name, str, "adapters")
        self.check([name])
        del self.adapters[name]

    def size(self, name: str) -> int:
        """Return the bytes of an adapter's tensors."""
        check_kind(name, str, "adapters")
        self.check([name])
        return sum(t.numel() * t.element_size() for pair in self.adapters[name].values() for t in pair)

    def check(self, names: Sequence[str | None]) -> None:
        """Check that the bank holds these names.

        Raises:
            InputError: it does not hold one of them.
        """
        for name in check_items(names, object, "adapters", "name"):
            if name is not None:
                check_kind(name, str, "adapters")
            if name is not None and name not in self.adapters:
                held = ", ".join(self.adapters) or "nothing"
                raise InputError(f"the bank does not hold {name!r} (it holds: {held})", where="adapters")

    @contextmanager
    def use(self, names: Sequence[str | None]) -> Iterator[None]:
        """Compute row b of every batch with adapter names[b] in this context, None for the base alone.

        Raises:
            InputError: the bank does not hold a name, or is in use already.
        """
        self.check(names)
        if self.owner:
            raise InputError("is in use already", where="bank")
        present = list(dict.fromkeys(name for name in names if name is not None))
        self.owner = [-1 if name is None else present.index(name) for name in names]
        for path, layer in self.layers.items():
            pairs = [self.adapters[name].get(path) for name in present]
            layer.stack = stack_pairs(pairs, layer.weight) if any(pairs) else None
        self.keep(range(len(names)))
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.stack = layer.rows = None
            self.owner = []

    def keep(self, places: Sequence[int]) -> None:
        """Keep only these rows of the batch; generation of the others has ended."""
        if not self.owner:
            return
        self.owner = [self.owner[place] for place in places]
        present = sorted(set(self.owner) - {-1})
        for layer in self.layers.values():
            if layer.stack is not None and len(present) < len(layer.stack[0]):
                A, B = layer.stack
                layer.stack = (A[present], B[present]) if present else None
        self.owner = [present.index(mine) if mine >= 0 else -1 for mine in self.owner]
        rows = group_rows(self.owner, self.model.embedding.weight.device)
        for layer in self.layers.values():
            layer.rows = rows

    def close(self) -> None:
        """Remove the bank: the model is plain again, and trainable as before."""
        restore(self.model, self.layers)
        for name, p in self.model.named_parameters():
            p.requires_grad_(name in self.trained)
        self.model.adapter = None
        self.adapters = {}


def stack_pairs(pairs: Sequence[Pair | None], weight: Tensor) -> Pair:
    """Stack the adapters' pairs, padded with zeros to the largest rank. -> [n, r, K], [n, N, r]

    On a CUDA device B is contiguous, as the Triton kernel reads it; a CPU's batched product is faster on [n, r, N].
    """
    (out, width), count = weight.shape, len(pairs)
    rank = max(A.shape[0] for A, _ in filter(None, pairs))
    As = weight.new_zeros(count, rank, width)
    Bs = weight.new_zeros(count, out, rank) if weight.is_cuda else weight.new_zeros(count, rank, out).mT
    for j, pair in enumerate(pairs):
        if pair is not None:
            As[j, : pair[0].shape[0]], Bs[j, :, : pair[1].shape[1]] = pair
    return As, Bs
