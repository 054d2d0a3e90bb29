"""Prefix-tuning (Li & Liang 2021) on one page: train a tiny decoder, freeze it, and train P virtual tokens.

The base learns to count up after the token UP and down after DOWN. The rows of the new task have neither token, and all
count down, which the frozen base cannot know. In each layer a prefix puts P trained keys and values before the row's:

    k, v = [prefix_k ; k], [prefix_v ; v]        every token sees the P columns, then itself and what came before

(This decoder has no positions: counting needs none. With positions the virtual tokens have 0 .. P-1 and the row begins
at P.) Run it with the name of an SVG file for a picture of the attention weights; it takes a few seconds on one core.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UP, DOWN, VOCABULARY = 10, 11, 12  # the tokens 0 to 9 are themselves
WIDTH, HEADS, LAYERS, P = 32, 2, 2, 3
DOWNWARDS = -torch.ones(32, dtype=torch.long)


class Block(nn.Module):
    """Causal attention and an MLP; `prefix` [2, H, P, D] are the layer's trained keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, prefix: Tensor | None) -> Tensor:
        rows, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(rows, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
        self.cached = torch.stack([k, v])  # the decode cache of a text: the text init of a prefix
        if prefix is not None:
            key, value = prefix[:, None].expand(-1, rows, -1, -1, -1)  # two of [B, H, P, D]
            k, v = torch.cat([key, k], dim=2), torch.cat([value, v], dim=2)  # [B, H, P + T, D]
        seen = torch.ones(tokens, k.shape[2], dtype=torch.bool).tril(k.shape[2] - tokens)  # [T, P + T]
        scores = (q @ k.transpose(2, 3) / k.shape[3] ** 0.5).masked_fill(~seen, -torch.inf)
        self.weights = scores.softmax(dim=3)  # [B, H, T, P + T]
        x = x + self.out((self.weights @ v).transpose(1, 2).flatten(2))  # [B, T, C]
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):  # blocks between an embedding and a head
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, ids: Tensor, prefix: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)  # [B, T, C]
        for layer, block in enumerate(self.blocks):
            x = block(x, None if prefix is None else prefix[layer])
        return self.head(x)  # [B, T, V]


def rows_of(direction: Tensor, told: bool) -> Tensor:
    """Rows of 8 digits that count up (1) or down (-1), wrapping; `told`: behind the token that says which."""
    counted = (torch.randint(0, 10, (len(direction), 1)) + direction[:, None] * torch.arange(8)) % 10  # [B, 8]
    return torch.cat([torch.where(direction > 0, UP, DOWN)[:, None], counted], dim=1) if told else counted


def loss_of(model: Decoder, ids: Tensor, prefix: Tensor | None = None) -> Tensor:
    """Nats per digit, from the second of the row's digits on."""
    return F.cross_entropy(model(ids, prefix)[:, -8:-1].flatten(0, 1), ids[:, -7:].flatten())


def train(model: Decoder, rate: float, steps: int, prefix: nn.Parameter | None = None) -> tuple[float, float]:
    """Train with Adam, the prefix if there is one, else the whole model; returns the first and the last loss."""
    optimizer, losses = torch.optim.Adam(model.parameters() if prefix is None else [prefix], lr=rate), []
    for _ in range(steps):
        told = prefix is None
        ids = rows_of(torch.randint(0, 2, (32,)) * 2 - 1 if told else DOWNWARDS, told)
        losses.append(loss_of(model, ids, prefix))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return losses[0].item(), losses[-1].item()


def keys_and_values(model: Decoder, text: list[int]) -> Tensor:
    """The keys and values of a text in each layer: the text init of a prefix. [L, 2, H, P, D]"""
    model(torch.tensor([text]))
    return torch.stack([block.cached[:, 0] for block in model.blocks]).detach()


def draw(weights: Tensor, side: int = 22) -> str:
    """Attention weights [T, P + T] as an SVG: rows are queries, columns keys, the prefix in red."""
    squares = [
        f'<rect x="{s * side}" y="{t * side}" width="{side}" height="{side}" stroke="#ccc" '
        f'fill="{"#b03060" if s < P else "#204a87"}" fill-opacity="{weight:.2f}"/>'
        for t, line in enumerate(weights.tolist()) for s, weight in enumerate(line)
    ]  # fmt: skip
    size = 'width="{1}" height="{0}"'.format(*(side * n for n in weights.shape))
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(squares)}</svg>\n'


def main(picture: list[str]) -> None:
    torch.manual_seed(0)
    train(model := Decoder(), 3e-3, 300)
    model.requires_grad_(False)
    print(f"not told the direction: {loss_of(model, rows_of(DOWNWARDS, told=False)).item():.3f} nats per digit")
    text, ids = keys_and_values(model, [DOWN] * P), rows_of(DOWNWARDS, told=False)
    written = model(torch.cat([torch.full((32, P), DOWN), ids], dim=1))[:, P:]
    print(f"with text init a prefix equals that text: {(model(ids, text) - written).abs().max().item():.0e} apart")
    wrong, noise = keys_and_values(model, [UP] * P), torch.randn(LAYERS, 2, HEADS, P, WIDTH // HEADS)
    for name, start, rate in [("N(0, 1)", noise, 2e-4), ("N(0, 1)", noise, 5e-2), ("zeros", 0 * noise, 5e-2),
                              ("UP UP UP", wrong, 5e-2), ("DOWN DOWN DOWN", text, 5e-2)]:  # fmt: skip
        first, last = train(model, rate, 60, prefix := nn.Parameter(start.clone()))
        print(f"init {name:<15} learning rate {rate:.0e}   {first:.3f} -> {last:.3f}")
    model(ids[:1], prefix)
    if picture:  # the last layer's attention, heads averaged
        Path(picture[0]).write_text(draw(model.blocks[-1].weights[0].mean(dim=0)))


if __name__ == "__main__":
    main(sys.argv[1:])
