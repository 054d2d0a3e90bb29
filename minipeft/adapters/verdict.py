"""The report on a merge, and the comparison of the merged model with the unmerged one.

The unmerged model generates a greedy answer to each prompt. Over prompt and answer, with p_t the unmerged model's
next-token distribution and q_t the merged one's,

    KL_t = sum_v p_t(v) (log p_t(v) - log q_t(v))          in nats, in float64

Only the unmerged model's hidden states, [T, C] a prompt, and head are kept: no adapter changes the head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from minipeft.errors import InputError, check_items, check_methods, check_value, format_value
from minipeft.models import Decoder

ROWS = 64  # positions whose logits are formed at a time
CHANGE = 1e-3  # share of changed top-1 tokens above which the merge warns


class Prompter(Protocol):
    """The methods of a tokenizer that the comparison calls."""

    eos: int | None

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge: the number of weights, the largest change, and the share of the update lost to rounding.

    With prompts, also the comparison of the merged model with the unmerged one; without, those fields are None.
    """

    modules: int
    largest_change: float
    relative_error: float  # |W_new - W_old - update| / |update|, over all modules: the rounding to the weight's dtype
    prompts: int | None = None
    tokens: int | None = None  # positions compared: those of the prompts and of the unmerged model's answers
    mean_kl: float | None = None  # nats per token
    max_kl: float | None = None  # nats, of the token where it is largest
    changed_tokens: int | None = None  # positions with another most probable (top-1) token
    changed_answers: int | None = None  # prompts whose greedy answer differs
    format: str | None = None  # of the quantized base that was dequantized for the merge
    requantized_kl: float | None = None  # nats per token from the unmerged model, were the result quantized again
    requantized_tokens: int | None = None  # positions whose top-1 token would then differ

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warn if more than 0.1 % of the top-1 tokens, or any greedy answer, changed."""
        found = []
        if self.mean_kl is not None and not math.isfinite(self.mean_kl):
            found.append("the merged model's logits are not finite")
        if self.tokens and self.changed_tokens and self.changed_tokens > CHANGE * self.tokens:
            share = f"{100 * self.changed_tokens / self.tokens:.2g} %"
            found.append(f"merging changes {share} of the top-1 tokens ({self.changed_tokens:,} of {self.tokens:,})")
        if self.changed_answers:
            found.append(f"merging changes {self.changed_answers} of {self.prompts} greedy answers")
        return tuple(found)

    def __str__(self) -> str:
        rows = [
            ("merged", f"{self.modules} modules"),
            (
                "weights",
                f"largest change {self.largest_change:.3g}, {100 * self.relative_error:.3g} % lost to rounding",
            ),
        ]
        if self.prompts is None:
            rows.append(("answers", "not compared: no prompts were given"))
        else:
            rows += [
                ("compared", f"{self.tokens:,} tokens of {self.prompts} prompts and their answers"),
                ("KL", f"mean {self.mean_kl:.3g}, max {self.max_kl:.3g} nats per token"),
                ("top-1", f"{self.changed_tokens:,} of {self.tokens:,} tokens changed"),
                ("answers", f"{self.changed_answers} of {self.prompts} greedy answers changed"),
            ]
        if self.format is not None:
            cost = f"KL {self.requantized_kl:.3g} nats per token, {self.requantized_tokens:,} top-1 tokens changed"
            rows.append((f"in {self.format}", f"quantized again: {cost}"))
        rows += [("warning", text) for text in self.warnings]
        return "\n".join(f"{name:<10} {text}" for name, text in rows)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))


class Comparison:
    """The unmerged model's greedy answers and hidden states for some prompts, to compare the merged model with.

    Raises:
        InputError: a prompt cannot be answered.
    """

    def __init__(self, model: Decoder, prompts: Sequence[str], tokenizer: Prompter | None, new_tokens: int):
        self.prompts = check_prompts(model, prompts, tokenizer, new_tokens)
        self.ends, self.new_tokens = find_ends(model, tokenizer), new_tokens
        self.head = copy.deepcopy(model.lm_head)  # before a cast
        with evaluating(model):
            self.answers = [self.answer(model, prompt) for prompt in self.prompts]  # ids without the EOS
            self.hidden = [compute_hidden(model, p + a) for p, a in zip(self.prompts, self.answers)]  # [T, C] each

    def answer(self, model: Decoder, prompt: list[int]) -> list[int]:
        return answer_greedily(model, prompt, self.ends, self.new_tokens)

    def measure(self, model: Decoder) -> dict[str, int | float]:
        """Compare the merged model with the unmerged one; returns fields of MergeReport."""
        divergences, changed_tokens, changed_answers = [], 0, 0
        with evaluating(model):
            for prompt, answer, before in zip(self.prompts, self.answers, self.hidden):
                after = compute_hidden(model, prompt + answer)  # [T, C]
                for old, new in zip(before.split(ROWS), after.split(ROWS)):
                    p, q = self.unmerged_logits(model, old), model.logits(new)  # [n, V]
                    divergences.append(compute_divergence(p, q))  # [n]
                    changed_tokens += int((p.argmax(dim=-1) != q.argmax(dim=-1)).sum())
                changed_answers += self.answer(model, prompt) != answer
        kl = torch.cat(divergences)
        return {
            "prompts": len(self.prompts),
            "tokens": len(kl),
            "mean_kl": kl.mean().item(),
            "max_kl": kl.max().item(),
            "changed_tokens": changed_tokens,
            "changed_answers": changed_answers,
        }

    def unmerged_logits(self, model: Decoder, hidden: Tensor) -> Tensor:
        """Compute the unmerged model's logits from its hidden states. [n, C] -> [n, V]"""
        merged, model.lm_head = model.lm_head, self.head
        try:
            return model.logits(hidden)
        finally:
            model.lm_head = merged


@contextmanager
def evaluating(model: Decoder) -> Iterator[None]:
    """Context manager: no dropout and no gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def check_prompts(
    model: Decoder, prompts: Sequence[str], tokenizer: Prompter | None, new_tokens: int
) -> list[list[int]]:
    """Encode each prompt and check that it leaves room for an answer.

    Raises:
        InputError: no prompts, no tokenizer, or a prompt that is empty or too long.
    """
    texts = check_items(prompts, str, "check")
    if not texts:
        raise InputError(f"{format_value(prompts)} must be a list of texts", where="check")
    if tokenizer is None:
        raise InputError("a tokenizer is needed", where="check", hint="merge_adapter(model, check=..., tokenizer=...)")
    check_methods(tokenizer, ("encode",), "Tokenizer", "tokenizer")
    check_value(new_tokens, int, {"least": 1}, "new_tokens")
    rows, room = [tokenizer.encode(text) for text in texts], model.config.context - new_tokens
    for number, row in enumerate(rows, 1):
        if not row:
            raise InputError("has no tokens", where=f"prompt {number}")
        if len(row) > room:
            problem = f"{len(row)} tokens and {new_tokens} new ones exceed the context, {model.config.context}"
            raise InputError(problem, where=f"prompt {number}")
    return rows


def find_ends(model: Decoder, tokenizer: Prompter | None) -> set[int]:
    """Find the ids that end an answer: the tokenizer's EOS and those of config.json."""
    given = model.config.eos_token_id
    listed = given if isinstance(given, tuple) else (given,)
    return {token for token in (*listed, None if tokenizer is None else tokenizer.eos) if token is not None}


def compute_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) of each row, at least 0. [n, V], [n, V] -> [n], float64"""
    log_p, log_q = (logits.double().log_softmax(dim=-1) for logits in (p_logits, q_logits))
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp(min=0)


def compute_hidden(model: Decoder, ids: Sequence[int]) -> Tensor:
    """Compute the hidden states of one row. -> [T, C]"""
    return model.hidden(torch.tensor([ids], device=model.embedding.weight.device))[0]


def answer_greedily(model: Decoder, prompt: list[int], ends: set[int], new_tokens: int) -> list[int]:
    """Generate greedily until a token ends the answer."""
    device = model.embedding.weight.device
    cache, answer = model.new_cache(1, len(prompt) + new_tokens), []  # type: ignore[var-annotated]
    ids = torch.tensor([prompt], device=device)
    while len(answer) < new_tokens:
        token = int(model.logits(model.hidden(ids, cache=cache)[:, -1]).argmax())
        if token in ends:
            break
        answer.append(token)
        ids = torch.tensor([[token]], device=device)
    return answer
