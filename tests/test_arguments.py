"""Bad arguments of the public functions: each is refused by name, before anything is trained, drawn or written.

Files and flags are in test_bad_inputs.py. Here a table holds the call and the text of its error; a control shows that
the same calls work with sound arguments.
"""
# ruff: noqa: E501 (a table)

import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import minipeft
from minipeft.data.examples import Example
from minipeft.data.packing import Batches
from minipeft.data.templates import format_prompt
from minipeft.data.tokens import Tokenizer
from minipeft.errors import InputError
from minipeft.generation import answer
from minipeft.metrics.scores import score_texts
from minipeft.metrics.text import chrf
from minipeft.models import FAMILIES, Decoder
from minipeft.models.config import parse_config
from minipeft.runs.config import run_config
from minipeft.training.loop import TrainState, evaluate, train
from tests.small import write_pairs, write_small_model

HUGE = 10**400


class Place:
    """A tokenizer, pairs, and a fresh small model with LoRA."""

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return minipeft.load_tokenizer(self.folder / "model")

    @cached_property
    def examples(self) -> list[Example]:
        return minipeft.encode_pairs(minipeft.load_pairs(self.folder / "pairs.jsonl"), self.tokenizer)

    @cached_property
    def model(self) -> Decoder:
        model = minipeft.load_model(self.folder / "model")
        minipeft.add_adapter(model, minipeft.LoRAConfig(rank=2))
        return model

    def batches(self, **given: Any) -> Batches:
        return minipeft.pack(self.examples, self.tokenizer, **{"length": 64, "batch": 2, **given})

    def steps(self, batches: Any = None, steps: int = 2, **given: Any) -> list[minipeft.Step]:
        config = minipeft.TrainConfig(steps=steps, **given)
        return list(train(self.model, self.batches() if batches is None else batches, config))

    def generate(self, prompts: Any, **given: Any) -> list[str]:
        return minipeft.generate(
            self.model, self.tokenizer, prompts, minipeft.GenerateConfig(**{"max_new_tokens": 2, **given})
        )

    def batch(self, **changes: Any) -> minipeft.Batch:
        held = vars(self.batches()[0]) | changes
        return minipeft.Batch(**held)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("arguments")
    write_small_model(place / "model")
    write_small_model(place / "llama", "llama")
    write_pairs(place / "pairs.jsonl", 8)
    return place


@pytest.fixture
def place(folder: Path) -> Place:
    return Place(folder)


def test_the_sound_calls_work(place: Place) -> None:
    """The control."""
    assert len(place.steps()) == 2
    assert len(place.generate(["x", "y"])) == 2
    assert evaluate(place.model, list(place.batches())) > 0
    assert minipeft.bleu(["a b c d"], ["a b c d"]).score == 1
    assert minipeft.bleu(["a b c d"], [["a b c d"]]).score == 1


def ids(*numbers: int) -> list[Example]:
    return [Example([*numbers, 0], 1)]


def rows(length: int, value: int = 1) -> minipeft.Batch:
    """One document of so many tokens."""
    tokens = torch.full((1, length), value)
    return minipeft.Batch(tokens, tokens.clone(), torch.zeros_like(tokens))


def llama(place: Place) -> Decoder:
    return minipeft.load_model(place.folder / "llama")


def train_on(model: Decoder, batch: Any) -> None:
    minipeft.add_adapter(model, minipeft.LoRAConfig(rank=2))
    list(train(model, [batch], minipeft.TrainConfig(steps=1)))


def between_steps(place: Place, act: Callable[[Decoder], object]) -> None:
    """Do something to the model after the first step."""
    for _ in train(place.model, place.batches(), minipeft.TrainConfig(steps=3)):
        act(place.model)


def with_gradients_off(place: Place, context: Any) -> None:
    with context:
        place.steps()


def freeze(model: Decoder) -> None:
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)


def spoiled(model: Decoder) -> Decoder:
    minipeft.remove_adapter(model)
    with torch.no_grad():
        model.embedding.weight[3, 1] = math.nan
    return model


CALLS: dict[str, tuple[Callable[[Place], object], str]] = {
    "prompts: one text": (lambda p: p.generate("hello"), "prompts: 'hello' must be a list of texts. Put it in a list"),
    "prompts: one text, answer": (lambda p: answer(p.model, p.tokenizer, "hi", minipeft.GenerateConfig()), "prompts: 'hi'"),
    "prompts: None": (lambda p: p.generate(None), "prompts: None must be a list of texts"),
    "prompts: a number": (lambda p: p.generate(5), "prompts: 5 must be a list of texts"),
    "prompts: numbers": (lambda p: p.generate([5]), "prompts[0]: 5 must be text"),
    "prompts: a None": (lambda p: p.generate(["x", None]), "prompts[1]: None must be text"),
    "prompts: bytes": (lambda p: p.generate(b"xy"), "prompts: b'xy' must be a list of texts"),
    "prompts: a dict": (lambda p: p.generate({"x": 1}), "prompts: {'x': 1} must be a list of texts"),
    "prompts: a set": (lambda p: p.generate({"x"}), "prompts: a set must be a list of texts"),
    "prompt: empty": (lambda p: p.generate(["x", ""]), "prompt 2: has no tokens: it is empty"),
    "prompt: blank": (lambda p: p.generate([" \n"]), "prompt 1: is blank"),
    "prompt: NUL": (lambda p: p.generate(["a\0b"]), "prompt 1: holds a NUL character at 1"),
    "prompt: half a character": (lambda p: p.generate(["a\ud800"]), "prompt 1: holds a lone surrogate, '\\ud800', which is no"),
    "format_prompt: a number": (lambda p: format_prompt(5), "intent: 5 must be text"),  # type: ignore[arg-type]
    "format_prompt: template": (lambda p: format_prompt("x", None), "template: None must be text"),  # type: ignore[arg-type]
    "tokenizer: text": (
        lambda p: minipeft.add_adapter(small_vocabulary(p), minipeft.PromptConfig(init="text"), "utf-8"),  # type: ignore[arg-type]
        "tokenizer: 'utf-8' must be a Tokenizer"),
    "bank: a None dropped": (lambda p: bank(p).drop(None), "adapters: None must be text"),  # type: ignore[arg-type]
    "bank: a None measured": (lambda p: bank(p).size(None), "adapters: None must be text"),  # type: ignore[arg-type]
    "run_config: a dict as method": (lambda p: run_config({"lora": 1}), "method: {'lora': 1} is not known"),  # type: ignore[arg-type]
    "merge: a number as prompts": (lambda p: minipeft.merge_adapter(p.model, check=5, tokenizer=p.tokenizer), "check: 5 must be a list"),  # type: ignore[arg-type]
    "merge: a number as prompt": (lambda p: minipeft.merge_adapter(p.model, check=[5], tokenizer=p.tokenizer), "check[0]: 5 must be text"),  # type: ignore[list-item]
    "merge: text as tokenizer": (lambda p: minipeft.merge_adapter(p.model, check=["x"], tokenizer="utf-8"), "tokenizer: 'utf-8' must be a Tokenizer"),  # type: ignore[arg-type]
    "merge: text as new_tokens": (lambda p: minipeft.merge_adapter(p.model, check=["x"], tokenizer=p.tokenizer, new_tokens="3"), "new_tokens: '3' must be an integer >= 1"),  # type: ignore[arg-type]
    "stop: letters": (lambda p: p.generate(["x"], stop="abc"), "stop: 'abc' must be a list"),
    "stop: a number": (lambda p: p.generate(["x"], stop=(5,)), "stop: 5 must be text"),
    "tokenizer of another model": (
        lambda p: minipeft.generate(small_vocabulary(p), p.tokenizer, ["x"]), "prompt 1: has id 88, but the model has 40 tokens. The tokenizer belongs to another model"),
    "encode: a number": (lambda p: p.tokenizer.encode(5), "text 1: 5 must be text"),  # type: ignore[arg-type]
    "encode_all: one text": (lambda p: p.tokenizer.encode_all("abc"), "texts: 'abc' must be a list of texts"),
    "decode: beyond": (lambda p: p.tokenizer.decode([-1]), "ids: -1 must be in [0, 2^32)"),
    "decode: text": (lambda p: p.tokenizer.decode(["a"]), "ids[0]: 'a' must be an int"),  # type: ignore[list-item]
    "decode: one number": (lambda p: p.tokenizer.decode(5), "ids: 5 must be a list"),  # type: ignore[arg-type]
    "decode: vast": (lambda p: p.tokenizer.decode(range(10**12)), "ids: holds over 134,217,728 integers"),
    "decode: beyond vast": (lambda p: p.tokenizer.decode(range(10**30)), "ids: holds over 134,217,728 integers"),
    "with_eos: a surrogate": (lambda p: p.tokenizer.with_eos("\ud800"), "eos token: holds a lone surrogate"),
    "with_eos: a number": (lambda p: p.tokenizer.with_eos(5), "eos token: 5 must be text"),  # type: ignore[arg-type]
    "Pair: a number": (lambda p: minipeft.Pair(5, "x"), "intent: 5 must be text"),  # type: ignore[arg-type]
    "Pair: None": (lambda p: minipeft.Pair("x", None), "snippet: None must be text"),  # type: ignore[arg-type]
    "Pair: question": (lambda p: minipeft.Pair("x", "y", "z"), "question_id: 'z' must be an integer"),  # type: ignore[arg-type]
    "Example: text": (lambda p: minipeft.pack([Example("abc", 1)], p.tokenizer), "example 0: its ids must be a list of integers, not 'abc'"),  # type: ignore[arg-type]
    "Example: numbers": (lambda p: minipeft.pack([Example([1.5], 1)], p.tokenizer), "example 0: its ids must be a list of integers, not [1.5]"),  # type: ignore[list-item]
    "Example: prompt": (lambda p: minipeft.pack([Example([1], -1)], p.tokenizer), "example 0: prompt_tokens: -1 must be an integer >= 0"),
    "Batch: a list": (lambda p: p.steps([p.batch(ids=[1])]), "step 1: ids: [1] must be a tensor of integers"),
    "encode_pairs: texts": (lambda p: minipeft.encode_pairs(["a"], p.tokenizer), "pairs[0]: 'a' must be a Pair"),  # type: ignore[list-item]
    "encode_pairs: None": (lambda p: minipeft.encode_pairs(None, p.tokenizer), "pairs: None must be a list of Pairs"),  # type: ignore[arg-type]
    "load_pairs: a number": (lambda p: minipeft.load_pairs(5), "source: 5 must be a path"),  # type: ignore[arg-type]
    "load_pairs: NUL": (lambda p: minipeft.load_pairs("a\0b"), "source: 'a\\x00b': holds a NUL character"),
    "load_model: None": (lambda p: minipeft.load_model(None), "source: None must be a path"),  # type: ignore[arg-type]
    "load_model: NUL": (lambda p: minipeft.load_model("a\0"), "source: 'a\\x00': holds a NUL character"),
    "load_model: device": (lambda p: minipeft.load_model(p.folder / "model", device="abacus"), "device: 'abacus' cannot be used"),
    "load_model: device None": (lambda p: minipeft.load_model(p.folder / "model", device=None), "device: None must be text"),  # type: ignore[arg-type]
    "load_tokenizer: a list": (lambda p: minipeft.load_tokenizer([]), "source: [] must be a path"),  # type: ignore[arg-type]
    "load_tokenizer: surrogate": (lambda p: minipeft.load_tokenizer("\ud800"), "source: '\\ud800': holds a lone surrogate"),
    "load_adapter: None": (lambda p: minipeft.load_adapter(llama(p), None), "source: None must be a path"),  # type: ignore[arg-type]
    "save_adapter: a number": (lambda p: minipeft.save_adapter(p.model, 5), "folder: 5 must be a path"),  # type: ignore[arg-type]
    "save_adapter: NUL": (lambda p: minipeft.save_adapter(p.model, "a\0"), "folder: 'a\\x00': holds a NUL"),
    "save_model: None": (lambda p: minipeft.save_model(llama(p), None), "folder: None must be a path"),  # type: ignore[arg-type]
    "save_model: NaN": (lambda p: minipeft.save_model(spoiled(p.model), p.folder / "nan"),
                        "transformer.wte.weight: holds NaN or Inf, and is not saved"),
    "pack: beyond the vocabulary": (
        lambda p: minipeft.pack(ids(5, 999), p.tokenizer, length=8), "example 0: id 999 is not one of the tokenizer's 257"),
    "pack: texts": (lambda p: minipeft.pack(["ab"], p.tokenizer), "examples[0]: 'ab' must be an Example"),  # type: ignore[list-item]
    "pack: None": (lambda p: minipeft.pack(None, p.tokenizer), "examples: None must be a list of Examples"),  # type: ignore[arg-type]
    "pack: seed a fraction": (lambda p: p.batches(seed=1.5), "seed: 1.5 must be an integer in [0, 2^63)"),
    "pack: length None": (lambda p: p.batches(length=None), "length: None must be an integer"),
    "pack: vast length": (lambda p: p.batches(length=10**12), "length: 1000000000000 is beyond the limit of 1,048,576"),
    "add_adapter: seed": (lambda p: minipeft.add_adapter(llama(p), minipeft.LoRAConfig(), seed=1.5),  # type: ignore[arg-type]
                          "seed: 1.5 must be an integer in [0, 2^63)"),
    "add_adapter: vast rank": (lambda p: minipeft.add_adapter(llama(p), minipeft.LoRAConfig(rank=10**10)),
                               "rank: takes "),
    "add_adapter: no model": (lambda p: minipeft.add_adapter(None, minipeft.LoRAConfig()), "model: None must be a Decoder"),  # type: ignore[arg-type]
    "add_adapter: a dict": (lambda p: minipeft.add_adapter(p.model, {"rank": 2}), "dict is not an adapter's config (FullConfig"),
    "add_adapter: tokenizer": (lambda p: minipeft.add_adapter(llama(p), minipeft.PrefixConfig(), 5),  # type: ignore[arg-type]
                               "tokenizer: 5 must be a Tokenizer"),
    "rope types that contradict": (
        lambda p: parse_config(FAMILIES["llama"].config, {"model_type": "llama", "rope_scaling": {
            "rope_type": "linear", "type": "yarn", "factor": 2.0}}), "rope_scaling: rope_type 'linear' and type 'yarn' contradict"),
    "seed a fraction": (lambda p: minipeft.TrainConfig(seed=1.5), "seed: 1.5 must be an integer in [0, 2^63)"),  # type: ignore[arg-type]
    "learning rate True": (lambda p: minipeft.TrainConfig(learning_rate=True), "learning_rate: True must be"),
    "learning rate a tensor": (lambda p: minipeft.TrainConfig(learning_rate=torch.tensor(0.1)), "learning_rate: a Tensor must be"),  # type: ignore[arg-type]
    "learning rate a numpy scalar": (lambda p: minipeft.TrainConfig(learning_rate=np.float32(0.1)), "learning_rate: a float32 must be"),  # type: ignore[arg-type]
    "learning rate that trains nothing": (lambda p: minipeft.TrainConfig(learning_rate=1e-320), "learning_rate: 1e-320 must be finite and > 0 in float32"),
    "temperature beyond float32": (lambda p: minipeft.GenerateConfig(temperature=1e300), "temperature: 1e+300 must be finite and >= 0 in float32"),
    "temperature next to 0": (lambda p: minipeft.GenerateConfig(temperature=1e-45), "temperature: 1e-45 must be 0 (greedy), or in [1e-06, 1e+06]"),
    "top_p next to 0": (lambda p: minipeft.GenerateConfig(top_p=1e-300), "top_p: 1e-300 must be in (0, 1] in float32"),
    "alpha beyond float32": (lambda p: minipeft.LoRAConfig(alpha=1e300), "alpha: 1e+300 must be finite and > 0 in float32"),
    "accumulate without end": (lambda p: minipeft.TrainConfig(accumulate=10**12), "accumulate: 1000000000000 is beyond the limit of 65,536"),
    "text None": (lambda p: minipeft.PrefixConfig(text=None), "text: None must be text"),  # type: ignore[arg-type]
    "text a surrogate": (lambda p: minipeft.PromptConfig(text="\ud800"), "text: holds a lone surrogate"),
    "text NUL": (lambda p: minipeft.PromptConfig(text="a\0"), "text: holds a NUL character at 1"),
    "text init None": (lambda p: minipeft.PrefixConfig(init=None), "init: None is not known (text, normal, peft)"),  # type: ignore[arg-type]
    "train: beyond the vocabulary": (lambda p: p.steps([p.batch(ids=torch.full((2, 64), 400))]), "step 1: ids: hold 400, but the model has 257 tokens"),
    "train: negative ids": (lambda p: p.steps([p.batch(ids=torch.full((2, 64), -1))]), "step 1: ids: hold -1, but the model has"),
    "train: labels beyond": (lambda p: p.steps([p.batch(labels=torch.full((2, 64), 300))]), "step 1: labels: hold 300, but the model"),
    "train: shapes": (lambda p: p.steps([p.batch(labels=torch.ones(2, 5).long())]), "step 1: labels: shape [2, 5], but ids have [2, 64]"),
    "train: a flat batch": (lambda p: p.steps([minipeft.Batch(*(torch.ones(8).long(),) * 3)]), "step 1: ids: have shape [8], want [rows, tokens]"),
    "train: dtype": (lambda p: p.steps([p.batch(ids=torch.ones(2, 64))]), "step 1: ids: are torch.float32, want torch.int64"),
    "train: no batch": (lambda p: p.steps([5]), "step 1: 5 must be a Batch"),
    "train: too few batches": (lambda p: p.steps([p.batch()], steps=3), "step 2: there is no batch 1"),
    "train: batches None": (lambda p: list(train(p.model, None, minipeft.TrainConfig(steps=1))),  # type: ignore[arg-type]
                            "batches: None must be what pack returns, or a list of Batch"),
    "train: config": (lambda p: train(p.model, p.batches(), {"steps": 3}), "config: {'steps': 3} must be a TrainConfig"),  # type: ignore[arg-type]
    "train: state": (lambda p: train(p.model, p.batches(), minipeft.TrainConfig(steps=1), 5), "state: 5 must be a TrainState"),  # type: ignore[arg-type]
    "train: rows beyond the context": (lambda p: train_on(llama(p), rows(120)), "step 1: documents: the longest reaches position 119, but the model's context is 96"),
    "train: no room for virtual tokens": (
        lambda p: train_with_prefix(p, rows(96)), "step 1: documents: the longest reaches position 101, but the model's context is 96, of which 6 are virtual tokens"),
    "train: no_grad": (lambda p: with_gradients_off(p, torch.no_grad()), "train: gradients are off: torch.no_grad"),
    "train: inference_mode": (lambda p: with_gradients_off(p, torch.inference_mode()), "train: gradients are off: torch.no_grad"),
    "train: frozen in mid run": (lambda p: between_steps(p, freeze), "step 2: 'transformer.h.0.attn.c_attn.lora_A' was frozen"),
    "train: base cast in mid run": (lambda p: between_steps(p, lambda m: m.to(torch.bfloat16)),
                                    "step 2: 'transformer.wte.weight' was torch.float32 and is torch.bfloat16"),
    "train: adapter removed in mid run": (lambda p: between_steps(p, minipeft.remove_adapter), "step 2: "),
    "evaluate: beyond the vocabulary": (lambda p: evaluate(p.model, [p.batch(ids=torch.full((2, 64), 400))]), "evaluate: ids: hold 400"),
    "evaluate: None": (lambda p: evaluate(p.model, None), "batches: None must be a list of Batch"),  # type: ignore[arg-type]
    "evaluate: rows beyond the context": (lambda p: evaluate(llama(p), [rows(120)]), "evaluate: documents: the longest reaches position 119"),
    "forward: beyond the vocabulary": (lambda p: p.model(torch.tensor([[400]])), "ids: hold 400, but the model has 257 tokens"),
    "forward: a list": (lambda p: p.model([1, 2]), "ids: [1, 2] must be a tensor of integers [rows, tokens]"),
    "forward: flat": (lambda p: p.model(torch.tensor([1, 2])), "ids: have shape [2], want [rows, tokens]"),
    "forward: floats": (lambda p: p.model(torch.ones(1, 2)), "ids: are torch.float32, want torch.int64"),
    "TrainState: no model": (lambda p: TrainState(5), "model: 5 must be a Module"),  # type: ignore[arg-type]
    "bleu: one text": (lambda p: minipeft.bleu("abc", ["abc"]), "predictions: one text was given where a list is expected: 'abc'"),
    "bleu: None": (lambda p: minipeft.bleu(None, None), "predictions: None must be a list of texts"),  # type: ignore[arg-type]
    "bleu: a generator": (lambda p: minipeft.bleu((t for t in "ab"), ["a", "b"]), "predictions: a generator must be a list of texts"),  # type: ignore[arg-type]
    "bleu: numbers": (lambda p: minipeft.bleu([5], ["a"]), "predictions[0]: expected text, got int"),  # type: ignore[list-item]
    "bleu: reference a number": (lambda p: minipeft.bleu(["a"], [5]), "references[0]: 5 must be a list of texts"),  # type: ignore[list-item]
    "bleu: reference a number in a list": (lambda p: minipeft.bleu(["a"], [[5]]), "references[0]: expected text, got int"),  # type: ignore[list-item]
    "bleu: tokenize": (lambda p: minipeft.bleu(["a"], ["a"], tokenize=[]), "tokenize: no tokenizer is called []; there are"),  # type: ignore[arg-type]
    "bleu: smooth": (lambda p: minipeft.bleu(["a"], ["a"], smooth=5), "smooth: no smoothing is called 5; there are"),  # type: ignore[arg-type]
    "bleu: smooth_value": (lambda p: minipeft.bleu(["a"], ["a"], smooth="floor", smooth_value="x"), "smooth_value: 'x' must be"),  # type: ignore[arg-type]
    "bleu: smooth_value huge": (lambda p: minipeft.bleu(["a"], ["a"], smooth="floor", smooth_value=HUGE), "smooth_value: an integer of 1329 bits"),
    "codebleu: None": (lambda p: minipeft.codebleu(None, []), "predictions: None must be a list of texts"),  # type: ignore[arg-type]
    "codebleu: mode": (lambda p: minipeft.codebleu(["a"], ["a"], mode=[]), "mode: no mode is called []; there are"),  # type: ignore[arg-type]
    "codebleu: weights": (lambda p: minipeft.codebleu(["a"], ["a"], weights=["a"] * 4), "weights: 'a' must be"),  # type: ignore[list-item]
    "codebleu: weights a matrix": (lambda p: minipeft.codebleu(["a"], ["a"], weights=torch.ones(4, 4)), "weights: "),  # type: ignore[arg-type]
    "chrf: vast": (lambda p: chrf(["a"], range(10**12)), "references: holds over 134,217,728"),  # type: ignore[arg-type]
    "codebleu: weights None": (lambda p: minipeft.codebleu(["a"], ["a"], weights=None), "weights: None must be a list"),  # type: ignore[arg-type]
    "codebleu: weights NaN": (lambda p: minipeft.codebleu(["a"], ["a"], weights=[math.nan] * 4), "weights: expected four numbers, none below 0, that sum to 1"),
    "chrf: None": (lambda p: chrf(["a"], [None]), "references[0]: None must be a list of texts"),  # type: ignore[list-item]
    "score_texts: questions": (lambda p: score_texts(["a"], ["a"], questions=5), "questions: 5 must be a list"),  # type: ignore[arg-type]
    "bank: a name": (lambda p: minipeft.AdapterBank(llama(p)).load(5, "x"), "name: 5 must be text"),  # type: ignore[arg-type]
    "bank: use": (lambda p: minipeft.AdapterBank(llama(p)).use("fr").__enter__(), "adapters: 'fr' must be a list"),
    "bank: no model": (lambda p: minipeft.AdapterBank(5), "model: 5 must be a Decoder"),  # type: ignore[arg-type]
    "new_cache: rows": (lambda p: p.model.new_cache("a", 5), "rows: 'a' must be an integer"),  # type: ignore[arg-type]
    "new_cache: vast": (lambda p: p.model.new_cache(1, 10**15), "length: 1000000000000000 must be an integer in [1, 2^31)"),
    "run_config: method": (lambda p: run_config(5), "method: 5 is not known"),  # type: ignore[arg-type]
    "run_config: huge": (lambda p: run_config("lora", model="demo", data="demo", epochs=HUGE), "epochs: an integer of 1329 bits must be"),
}  # fmt: skip


def bank(place: Place) -> minipeft.AdapterBank:
    return minipeft.AdapterBank(small_vocabulary(place))


def small_vocabulary(place: Place) -> Decoder:
    config, decoder = FAMILIES["gpt2"].config, FAMILIES["gpt2"].decoder
    model: Decoder = decoder(config(vocab_size=40, n_positions=96, n_embd=16, n_layer=1, n_head=2))
    model.initialize(torch.Generator().manual_seed(0))
    return model


def train_with_prefix(place: Place, batch: minipeft.Batch) -> None:
    model = llama(place)
    minipeft.add_adapter(model, minipeft.PrefixConfig(length=6), place.tokenizer)
    list(train(model, [batch], minipeft.TrainConfig(steps=1)))


@pytest.mark.parametrize("case", CALLS)
def test_what_cannot_be_used_is_refused(case: str, place: Place) -> None:
    call, text = CALLS[case]
    with pytest.raises(InputError) as caught:
        call(place)
    assert text in str(caught.value)
    assert len(str(caught.value)) < 400
