"""Text generation: one pass over the prompts (prefill), then one token at a time with the cache (decode).

    prompts, sorted by length -> batches -> rows of a batch (decoding.py) -> ids, until an end token, a stop text or
    the limit -> text

The next token is the likeliest or one of the nucleus (sampling.py). Each prompt has its own random stream, so that its
answer does not depend on its batch. A model with a bank of adapters may use another adapter in each row.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from minipeft.data.tokens import Tokenizer
from minipeft.decoding import ROWS, probe_places, start_rows
from minipeft.errors import (
    InputError,
    check_characters,
    check_fields,
    check_items,
    check_kind,
    check_methods,
    check_value,
    option,
)
from minipeft.models import Decoder
from minipeft.models.packed import PackedModel
from minipeft.sampling import draw_uniforms

# Decoding steps of a call from which its weights are packed in float16. Packing takes as long as it saves in 38 steps
# of one row, 19 of eight (SmolLM2-135M, one thread, docs/performance.md), and answers end before max_new_tokens.
PACKED_FROM = 128
COLDEST, HOTTEST = 1e-6, 1e6  # temperatures that logits can be divided by in float32


@dataclass(frozen=True)
class GenerateConfig:
    """How to generate; the defaults are the paper's. `temperature` 0 is greedy decoding."""

    max_new_tokens: int = option(64, "maximum number of tokens in an answer", least=1)
    temperature: float = option(0.2, "divides the logits; 0 is greedy decoding", least=0)
    top_p: float = option(
        0.95, "nucleus sampling: sample from the most probable tokens that sum to this probability", above=0, most=1
    )
    seed: int = option(0, "seed of sampling", least=0, below=2**63)
    stop: tuple[str, ...] = option((), "stop text that ends an answer; may be given more than once")
    batch: int = option(25, "prompts at a time", least=1)
    pack: bool = option(
        True, "on a CPU, decode with packed copies of the weights: 2 bytes a weight, 4 of one that is quantized in fp32"
    )
    batch_invariant: bool = option(
        False, "compute each answer with the same bits whatever prompts are beside it, eight at a time; slower"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.temperature and not COLDEST <= self.temperature <= HOTTEST:
            problem = f"{self.temperature:g} must be 0 (greedy), or in [{COLDEST:g}, {HOTTEST:g}]"
            raise InputError(problem, where="temperature")
        if any(not text for text in self.stop):
            raise InputError("a stop text is empty", where="stop")


@dataclass(frozen=True)
class Answer:
    """The generated answer to prompt `index`; `ended` is "eos", "stop" or "limit" (cut off)."""

    index: int
    text: str
    ids: list[int]
    ended: str


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: GenerateConfig | None = None,
    *,
    adapters: Sequence[str | None] | None = None,
) -> list[str]:
    """The answer to each prompt, in order, without the prompt.

    `adapters` names an adapter of the model's AdapterBank for each prompt, None for the base alone.

    Raises:
        InputError: `prompts` is a single text; a prompt is empty or blank, holds a NUL, has an id beyond the model's
            vocabulary, or does not fit in the context with `max_new_tokens`; `adapters` names one that no bank of the
            model holds.
    """
    config = GenerateConfig() if config is None else config
    answers = answer(model, tokenizer, prompts, config, adapters=adapters)
    return [a.text for a in sorted(answers, key=lambda a: a.index)]


def answer(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str] | Sequence[list[int]],
    config: GenerateConfig,
    *,
    only: Sequence[int] | None = None,
    adapters: Sequence[str | None] | None = None,
    ends: Collection[int] = (),
) -> Iterator[Answer]:
    """Generate an answer to each prompt, and yield each when its batch is done (batches are sorted by prompt length).

    A prompt is text, or ids. `only`: the indices of the prompts to answer, if the others are answered already; the
    answers do not depend on it. `ends`: ids that end an answer, beside the model's own.
    """
    check_kind(model, Decoder, "model")
    check_kind(config, GenerateConfig, "config")
    check_methods(tokenizer, ("encode_all", "decode", "eos"), "Tokenizer", "tokenizer")
    rows = encode_prompts(tokenizer, prompts)
    names = check_adapters(model, adapters, len(rows))
    if names is not None and config.batch_invariant:
        problem = "does not hold for a bank: how many rows have an adapter decides the size of its products"
        raise InputError(problem, where="batch_invariant", hint="Load one adapter")
    for number, row in enumerate(rows):
        check_room(model, row, config, f"prompt {number + 1}")
    for chosen in () if only is None else check_items(only, object, "only", "number"):
        check_value(chosen, int, {"least": 0, "below": len(rows)}, "only")
    order = sorted(range(len(rows)) if only is None else only, key=lambda i: len(rows[i]))
    batch = ROWS if config.batch_invariant else config.batch
    batches = (order[start : start + batch] for start in range(0, len(order), batch))
    ends = find_end_tokens(model, tokenizer).union(ends)
    return (a for batch in answer_batches(model, tokenizer, batches, rows, names, config, ends) for a in batch)


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str] | Sequence[list[int]]) -> list[list[int]]:
    """The ids of prompts that are texts, checked; of lists of ids, these."""
    if isinstance(prompts, list) and prompts and all(isinstance(prompt, list) for prompt in prompts):
        return [check_items(row, int, f"prompt {number}") for number, row in enumerate(prompts, start=1)]
    texts = check_items(prompts, str, "prompts")
    for number, text in enumerate(texts, start=1):
        check_prompt(text, f"prompt {number}")
    return tokenizer.encode_all(texts)


def stream(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: list[int],
    config: GenerateConfig,
    ends: Collection[int] = (),
    packed: PackedModel | None = None,
) -> Iterator[str]:
    """The same answer as `answer` gives to this prompt alone, a piece of text with each token.

    `packed`: the model's weights as `pack_for` packs them, for several calls.

    Raises:
        InputError: the prompt does not fit in the context together with `max_new_tokens`.
    """
    check_room(model, prompt, config, "prompt")
    stops = find_end_tokens(model, tokenizer).union(ends)
    device, shown, made = model.embedding.weight.device, "", list[int]()
    draws = draw_uniforms(config.seed, 0, config.max_new_tokens).to(device)  # [max_new_tokens]
    packed = pack_for(model, config) if packed is None else packed
    model.eval()
    with torch.no_grad(), packed.used():
        rows = start_rows(model, [prompt], 0, config.max_new_tokens, config.batch_invariant)
    for step in range(config.max_new_tokens):
        with torch.no_grad(), packed.used():
            if made:
                rows.advance(torch.tensor(made[-1:], device=device))
            ids = rows.choose(draws[None, step], config.temperature, config.top_p)  # [1]
        token = int(ids)
        if token in stops:
            break
        made.append(token)
        text = decode_new(tokenizer, prompt, made)
        if cuts := [text.index(mark) for mark in config.stop if mark in text]:
            yield text[len(shown) : min(cuts)]
            return
        ready = text[: len(text) - held_back(text, config.stop)]
        if ready.startswith(shown):
            yield ready[len(shown) :]
            shown = ready
    yield decode_new(tokenizer, prompt, made)[len(shown) :]


def held_back(text: str, stop: tuple[str, ...]) -> int:
    """How many characters at the end of a text may change, or go, with the next token: half a character, and what a
    stop text begins with."""
    half = len(text) - len(text.rstrip("\ufffd"))
    begun = (n for mark in stop for n in range(1, len(mark)) if text.endswith(mark[:n]))
    return max(half, max(begun, default=0))


def check_adapters(model: Decoder, adapters: Sequence[str | None] | None, prompts: int) -> list[str | None] | None:
    """The adapter's name for each prompt, or None where the caller named none."""
    if adapters is None:
        return None
    if not hasattr(model.adapter, "use"):  # a bank; this file uses only its `check`, `use` and `keep`
        raise InputError("the model holds no bank of adapters", where="adapters", hint="bank = AdapterBank(model)")
    if isinstance(adapters, str) or len(check_items(adapters, object, "adapters", "name")) != prompts:
        raise InputError(f"must be a list of {prompts} names, one for each prompt", where="adapters")
    model.adapter.check(adapters)
    return list(adapters)


def check_prompt(prompt: str, where: str) -> None:
    """Refuse an empty or blank prompt, and one with characters that training texts may not hold."""
    check_characters(prompt, where)
    if not prompt.strip():
        raise InputError("is blank" if prompt else "has no tokens: it is empty", where=where)


def check_room(model: Decoder, row: list[int], config: GenerateConfig, where: str) -> None:
    """Refuse a prompt without tokens, with ids beyond the vocabulary, or too long, before any prompt is answered."""
    room = model.config.context - model.virtual_tokens
    if not row:
        raise InputError("has no tokens", where=where)
    if max(row) >= (size := model.config.vocab_size):
        hint = "The tokenizer belongs to another model"
        raise InputError(f"has id {max(row)}, but the model has {size} tokens", where=where, hint=hint)
    if len(row) + config.max_new_tokens > room:
        taken = f" (of which {model.virtual_tokens} are virtual tokens)" if model.virtual_tokens else ""
        raise InputError(
            f"{len(row)} tokens and {config.max_new_tokens} new ones exceed the context, {model.config.context}{taken}",
            where=where,
            hint=f"Cut it to {max(0, room - config.max_new_tokens)} tokens or lower max_new_tokens",
        )


def answer_batches(
    model: Decoder,
    tokenizer: Tokenizer,
    batches: Iterable[list[int]],
    rows: list[list[int]],
    names: list[str | None] | None,
    config: GenerateConfig,
    ends: Collection[int],
) -> Iterator[list[Answer]]:
    """Answer the prompts of each batch together; the weights are packed once, before the first."""
    packed = pack_for(model, config, len(rows))  # not by those left: a resumed call has the bits of a whole one
    if config.batch_invariant and rows:
        with evaluating(model), packed.used():
            probe_places(model, min(rows, key=len))
    for numbers in batches:
        used = nullcontext() if names is None else model.adapter.use([names[n] for n in numbers])
        with evaluating(model), used, packed.used():
            made, ended = decode(model, tokenizer, numbers, [rows[n] for n in numbers], config, ends)
        yield [make_answer(tokenizer, n, rows[n], made[i], ended[i], config.stop) for i, n in enumerate(numbers)]


@contextmanager
def evaluating(model: Decoder) -> Iterator[None]:
    """Context manager: put the model in eval mode, and restore its mode at the end."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def pack_for(model: Decoder, config: GenerateConfig, prompts: int = 1) -> PackedModel:
    """Pack the weights for decoding, if the config wants it; in float16 where so many answers may be long enough for it
    to pay. That product has other bits, so with `batch_invariant` their number does not decide."""
    steps = config.max_new_tokens * (1 if config.batch_invariant else -(-prompts // config.batch))
    return PackedModel(model, empty=not config.pack, half=steps >= PACKED_FROM)


@torch.no_grad()
def decode(
    model: Decoder,
    tokenizer: Tokenizer,
    numbers: list[int],
    rows: list[list[int]],
    config: GenerateConfig,
    ends: Collection[int],
) -> tuple[list[list[int]], list[str]]:
    """Prefill the rows, then decode until all have ended; returns the new ids, and why each row ended."""
    device = model.embedding.weight.device
    drawn = [draw_uniforms(config.seed, number, config.max_new_tokens) for number in numbers]
    draws = torch.stack(drawn).to(device)  # [B, max_new_tokens]
    made: list[list[int]] = [[] for _ in rows]
    ended = ["limit"] * len(rows)
    live = list(range(len(rows)))  # the batch row of each row that is decoded
    filling = tokenizer.eos if tokenizer.eos is not None else 0
    decoded = start_rows(model, rows, filling, config.max_new_tokens, config.batch_invariant)
    for step in range(config.max_new_tokens):
        chosen = decoded.choose(draws[live, step], config.temperature, config.top_p)  # [B]
        for place, token in enumerate(chosen.tolist()):
            row = live[place]
            if ended[row] != "limit":
                continue
            if token in ends:
                ended[row] = "eos"
                continue
            made[row].append(token)
            if config.stop and any(text in decode_new(tokenizer, rows[row], made[row]) for text in config.stop):
                ended[row] = "stop"
        going = [place for place, row in enumerate(live) if ended[row] == "limit"]
        if not going or step + 1 == config.max_new_tokens:
            break
        if 2 * len(going) <= len(live):  # drop ended rows once they are half the batch: shrinking the cache copies it
            decoded.keep(going)
            chosen, live = chosen[going], [live[place] for place in going]
        decoded.advance(chosen)
    return made, ended


def find_end_tokens(model: Decoder, tokenizer: Tokenizer) -> set[int]:
    """The ids that end an answer: the tokenizer's EOS and config.json's (Llama 3 has several)."""
    given = model.config.eos_token_id
    listed = given if isinstance(given, tuple) else (given,)
    return {token for token in (tokenizer.eos, *listed) if token is not None}


def decode_new(tokenizer: Tokenizer, prompt: list[int], made: list[int]) -> str:
    """Decode the new ids in the context of the prompt: a tokenizer may drop a space at the start of a text."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + made)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(made)


def make_answer(
    tokenizer: Tokenizer, number: int, prompt: list[int], made: list[int], ended: str, stop: tuple[str, ...]
) -> Answer:
    """Make the answer to a prompt, cut at the first stop text."""
    text = decode_new(tokenizer, prompt, made)
    cuts = [text.index(mark) for mark in stop if mark in text]
    return Answer(number, text[: min(cuts)] if cuts else text, made, ended)
