"""LoRA on one page (Hu et al. 2021): what it adds, why nothing changes at first, what is trained, what merging does.

    python examples/lora_from_scratch.py          # some seconds on a CPU; step through it with `python -m pdb`

A tiny Llama first learns to count up by 1 (modulo 10). Then its weights are frozen, and LoRA teaches it to count up by
3. minipeft.LoRAConfig does the same with a fused kernel, for any model it loads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft import LoRAConfig, add_adapter
from minipeft.models.llama import Llama, LlamaConfig

RANK, ALPHA = 4, 8.0


class LoRA(nn.Module):
    """y = W x + (alpha / r) B A x, equation 3 of the paper, around a linear that stays as it is."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear  # W [out, in], frozen
        self.A = nn.Parameter(torch.randn(RANK, linear.in_features) * linear.in_features**-0.5)  # [r, in], random
        self.B = nn.Parameter(torch.zeros(linear.out_features, RANK))  # [out, r], zero: so B A = 0, nothing changes
        self.scale = ALPHA / RANK  # alpha need not be tuned again when r changes

    def forward(self, x: Tensor) -> Tensor:
        s = x @ self.A.t()  # [B, T, r]: x seen through r directions only
        return self.linear(x) + self.scale * (s @ self.B.t())  # [B, T, out]


def counting(step: int, rows: int = 32, length: int = 12) -> Tensor:
    """Rows that count up by `step` modulo 10 from a random digit. -> [rows, length]"""
    return (torch.randint(10, (rows, 1)) + step * torch.arange(length)) % 10


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Nats per digit: every digit but the first is predicted from those before it."""
    logits = model(ids[:, :-1])  # [rows, length - 1, 10]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def train(model: nn.Module, step: int, updates: int, rate: float) -> None:
    """Plain training of whatever requires a gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for update in range(1, updates + 1):
        loss = loss_of(model, counting(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if update == 1 or update % (updates // 3) == 0:
            print(f"   update {update:3}: loss {loss.item():.4f}")


@torch.no_grad()
def show(model: nn.Module) -> None:
    """Print the model's losses on both tasks."""
    print(f"   loss when counting by 1: {loss_of(model, counting(1)):.4f}, by 3: {loss_of(model, counting(3)):.4f}")


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=10, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, tie_word_embeddings=True)  # fmt: skip
    (model := Llama(config)).initialize(torch.Generator().manual_seed(0))
    ids = counting(3, rows=4)

    print(f"1. the base, {sum(p.numel() for p in model.parameters()):,} parameters, learns to count by 1")
    train(model, step=1, updates=150, rate=1e-2)
    show(model)

    print("2. freeze it, and put a LoRA in the place of each linear of each block")
    model.requires_grad_(False)
    before = model(ids)
    base, frozen = list(model.parameters()), [p.clone() for p in model.parameters()]
    places = [(parent, name, child) for block in model.blocks for parent in block.modules()
              for name, child in parent.named_children() if isinstance(child, nn.Linear)]  # fmt: skip
    adapters = [LoRA(linear) for _, _, linear in places]
    for (parent, name, _), lora in zip(places, adapters):
        setattr(parent, name, lora)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"   {len(adapters)} linears, {count:,} new parameters; logits change by {(model(ids) - before).abs().max()}")

    print("3. train A and B alone to count by 3")
    train(model, step=3, updates=150, rate=1e-2)
    show(model)
    assert all(torch.equal(p, old) for p, old in zip(base, frozen))
    print("   the parameters of the base are unchanged")

    print("4. the update of a weight has the weight's shape, but rank r")
    update = (first := adapters[0]).scale * (first.B @ first.A)  # [out, in]
    values = ", ".join(f"{v:.2f}" for v in torch.linalg.svdvals(update)[: RANK + 2])
    print(
        f"   {update.numel():,} entries, {first.A.numel() + first.B.numel()} parameters; singular values {values}, ..."
    )

    print("5. merge: W + (alpha / r) B A is a plain linear again, as fast as the base")
    adapted = model(ids)
    with torch.no_grad():
        for (parent, name, linear), lora in zip(places, adapters):
            linear.weight += lora.scale * (lora.B @ lora.A)
            setattr(parent, name, linear)
    print(f"   logits change by {(model(ids) - adapted).abs().max():.0e}")

    print("6. minipeft does the same: its A and B set to ours, on the base as it was")
    with torch.no_grad():
        for p, old in zip(base, frozen):
            p.copy_(old)
        print(add_adapter(model, LoRAConfig(rank=RANK, alpha=ALPHA)))
        for (parent, name, _), lora in zip(places, adapters):
            getattr(parent, name).lora_A.copy_(lora.A)
            getattr(parent, name).lora_B.copy_(lora.B)
    print(f"   logits differ from step 3's by {(model(ids) - adapted).abs().max():.0e}")


if __name__ == "__main__":
    main()
