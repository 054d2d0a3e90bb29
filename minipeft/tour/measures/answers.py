"""The numbers of the stops on answers: the decode cache, left padding, nucleus sampling."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from minipeft.data.templates import format_prompt
from minipeft.decoding import pad_left
from minipeft.generation import GenerateConfig
from minipeft.sampling import choose
from minipeft.study.charts import Bar, draw_bars
from minipeft.tour.bench import Bench
from minipeft.tour.values import Drawing, Table, Value, claim

NEW = 24  # tokens
DRAWS = 2000


@torch.no_grad()
def measure_cache(bench: Bench) -> Mapping[str, Value]:
    """Logits with and without the cache, and with padding on the left."""
    model, tokenizer = bench.model(), bench.tokenizer
    rows = [tokenizer.encode(format_prompt(pair.intent)) for pair in bench.pairs[-3:]]
    ids = torch.tensor(rows[:1])
    cache = model.new_cache(1, ids.shape[1] + NEW)
    cached, again, given, columns = [], [], ids, 0
    for _ in range(NEW):
        logits = model(given, cache=cache)[:, -1]
        cached.append(logits)
        given = logits.argmax(dim=-1, keepdim=True)
    whole = ids
    for _ in range(NEW):
        logits = model(whole)[:, -1]
        again.append(logits)
        columns += whole.shape[1]
        whole = torch.cat([whole, logits.argmax(dim=-1, keepdim=True)], dim=1)
    apart = (torch.stack(cached) - torch.stack(again)).abs().max().item()
    padded, documents = pad_left(rows, 0)
    together = model(padded, documents)[:, -1]
    alone = torch.cat([model(torch.tensor([row]))[:, -1] for row in rows])
    padding = (together - alone).abs().max().item()
    careless = (model(padded)[:, -1] - alone).abs().max().item()
    claim(max(apart, padding) < 1e-3 < careless, "cache and padding change rounding alone, careless padding the logits")
    return {
        "new": NEW,
        "prompt": len(rows[0]),
        "with_columns": len(rows[0]) + NEW - 1,
        "columns": columns,
        "ratio": columns / (len(rows[0]) + NEW - 1),
        "apart": apart,
        "lengths": " / ".join(str(len(row)) for row in rows),
        "padding": padding,
        "careless": careless,
    }


@torch.no_grad()
def measure_sampling(bench: Bench) -> Mapping[str, Value]:
    """The nucleus of one distribution, and how often its tokens are drawn."""
    model, tokenizer = bench.model(), bench.tokenizer
    logits = model(torch.tensor([tokenizer.encode(format_prompt(bench.pairs[0].intent))]))[:, -1]  # [1, V]
    config = GenerateConfig(temperature=1.0, top_p=0.9)
    probabilities = logits.softmax(dim=-1)[0]  # [V]
    order = probabilities.argsort(descending=True)
    before = probabilities[order].cumsum(dim=0) - probabilities[order]
    nucleus = order[before < config.top_p].tolist()
    draws = torch.rand(DRAWS, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(
        choose(logits.expand(DRAWS, -1), draws, config.temperature, config.top_p), minlength=probabilities.numel()
    )
    total = probabilities[nucleus].sum()
    claim(int(counts.sum()) == int(counts[nucleus].sum()) == DRAWS, "nothing outside the nucleus is drawn")
    wanted, got = probabilities[nucleus] / total, counts[nucleus] / DRAWS
    error = (wanted - got).abs().max().item()
    claim(error < 0.03, "tokens are drawn with their probabilities")
    shown = nucleus[:6]
    name = lambda token: repr(tokenizer.decode([token]))
    bars = [Bar(name(t), p := probabilities[t].item(), p, p, f"{p:.3f}", "tuned") for t in order[:10].tolist()]
    cold = (logits / 0.2).softmax(dim=-1)[0].sort(descending=True).values
    rows = [(name(t), (probabilities[t] / total).item(), (counts[t] / DRAWS).item()) for t in shown]
    words = "The ten most probable next tokens: " + ", ".join(f"{bar.name} {bar.label}" for bar in bars)
    return {
        "top_p": config.top_p,
        "vocabulary": probabilities.numel(),
        "nucleus": len(nucleus),
        "cold": 0.2,
        "cold_nucleus": int((cold.cumsum(dim=0) - cold < config.top_p).sum()),
        "draws": DRAWS,
        "error": error,
        "plot": Drawing(draw_bars(bars, words, unit="probability"), words),
        "table": Table(("token", "probability in the nucleus", "share of the draws"), rows),
    }
