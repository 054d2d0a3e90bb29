"""Random arguments: every public function and config returns a result or raises InputError.

Hypothesis draws the arguments: sound ones, of which one to three are replaced by odd values. Each call ends within
SECONDS and BYTES. The short form is the same each time; MINIPEFT_FUZZ=N makes N times as many calls from a seed that is
printed (MINIPEFT_SEED repeats it).
"""

# ruff: noqa: E501, PT017 (tables; an error's text is checked beside the outcomes that are none)

import copy
import dataclasses
import math
import os
import random
import resource
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import minipeft
from minipeft.adapters import METHODS
from minipeft.data.examples import Example, Pairs, split_by_question
from minipeft.data.packing import PackConfig
from minipeft.data.templates import format_prompt
from minipeft.data.tokens import Tokenizer
from minipeft.errors import InputError
from minipeft.generation import answer
from minipeft.hub import fetch
from minipeft.metrics.bleu import count_pairs, sentence_bleu
from minipeft.metrics.bootstrap import bootstrap_bleu
from minipeft.metrics.scores import score_texts
from minipeft.metrics.text import chrf, is_exact, is_repeated, is_valid_python
from minipeft.models import FAMILIES, Decoder
from minipeft.models.config import parse_config
from minipeft.runs.answers import read_answers
from minipeft.runs.config import DataConfig, ModelConfig, run_config
from minipeft.study.presets import StudyConfig
from minipeft.training.loop import learning_rate_at
from tests.small import write_pairs, write_small_model

SCALE = float(os.environ.get("MINIPEFT_FUZZ", "1"))
SEED = int(os.environ.get("MINIPEFT_SEED", "0" if SCALE == 1 else str(random.SystemRandom().randrange(2**32))))
SECONDS, BYTES = 5.0, 2**30
CALLS_EACH, CONFIGS_EACH = 24, 60


class Strange:
    """An object of an unrelated class."""

    def __repr__(self) -> str:
        return "<strange>"


NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 7, 255, 256, 2**20, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400, -(10**400)]),
    st.integers(-3, 40),
    st.floats(),
    st.sampled_from(
        [0.0, -0.0, 1e-320, 1e-45, 1e-38, 1e-12, 0.5, 1.0, 1e6, 1e38, 1e300, math.inf, -math.inf, math.nan]
    ),
)
TEXTS = st.one_of(
    st.sampled_from(["", " ", "\n", "\0", "a\0b", "\ud800", "x", "lora", "text", "q_proj", "c_attn", "(a+)+$", "[", "(",
                     "{intent}", "{intent}{intent}", "a" * 300, "a" * 100_000, "\u2028", "\x1b[31m", "cpu", "meta", "cuda",
                     "all-linear", "none", "train", "test", "conala", "é" * 5_000, "</s>", "<|endoftext|>", "1e999"]),
    st.text(max_size=12),
)  # fmt: skip
OTHERS = st.sampled_from([
    None, True, False, b"", b"x", bytearray(b"x"), Strange(), Strange, len, range(3), range(10**12), slice(3), ..., 1j,
    NotImplemented, np.float32(0.5), np.float64(0.5), np.int64(3), np.bool_(True), np.array("x"), np.array(3),
    np.zeros(3), np.zeros((2, 10), dtype=np.int64), np.array(["a", "b"]), np.array([None], dtype=object),
    torch.tensor(1), torch.tensor(0.5), torch.tensor([]), torch.ones(2, 3).long(), torch.full((2, 8), 400),
    torch.full((1, 3), -7), torch.ones(1, 200).long(), torch.ones(2, 8), torch.ones(2, 8, dtype=torch.bool),
    torch.ones(2, 3, 4).long(), torch.ones(2, 8).to(torch.int32), torch.zeros(2, 0).long(), torch.ones(2, 8, device="meta"),
    torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.device("cpu"), torch.nn.Linear(2, 2), Path("x"),
    InputError("x"), minipeft.LoRAConfig(2), minipeft.TrainConfig(), minipeft.Pair("a", "b"), Example([1, 2, 0], 1),
    Example([], 0), Example([1, 2], 9), Example([999], 0), set(), frozenset({1}), {}, {"a": 1}, {1: 2}, {"c_attn": 3}, (), [],
])  # fmt: skip
PLAIN = st.one_of(NUMBERS, TEXTS, OTHERS)
ODD = st.one_of(
    PLAIN,
    st.lists(PLAIN, max_size=3),
    st.lists(PLAIN, max_size=3).map(tuple),
    st.lists(st.lists(PLAIN, max_size=2), max_size=2),
    st.dictionaries(st.one_of(TEXTS, st.integers(0, 3)), PLAIN, max_size=2),
    st.just("a generator").map(lambda _: (t for t in "ab")),
)


@dataclasses.dataclass
class Place:
    """The parts of valid arguments."""

    folder: Path
    tokenizer: Tokenizer
    pairs: Pairs
    examples: list[Example]
    plain_model: Decoder
    tuned_model: Decoder

    def plain(self) -> Decoder:
        return copy.deepcopy(self.plain_model)

    def tuned(self) -> Decoder:
        return copy.deepcopy(self.tuned_model)

    def batch(self) -> minipeft.Batch:
        return minipeft.pack(self.examples, self.tokenizer, length=48, batch=2)[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("fuzz")
    write_small_model(folder / "model", layers=1)
    write_pairs(folder / "pairs.jsonl", 6)
    (folder / "answers.jsonl").write_text('{"prediction": "x", "reference": "x"}\n')
    tokenizer, pairs = minipeft.load_tokenizer(folder / "model"), minipeft.load_pairs(folder / "pairs.jsonl")
    plain, tuned = minipeft.load_model(folder / "model"), minipeft.load_model(folder / "model")
    minipeft.add_adapter(tuned, minipeft.LoRAConfig(2))
    minipeft.save_adapter(tuned, folder / "adapter")
    here = Path.cwd()
    (folder / "here").mkdir()
    os.chdir(folder / "here")  # an odd text may be a path
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or a hub id
        patch.setattr("minipeft.adapters.patterns.DEADLINE", 1.0)
        yield Place(folder, tokenizer, pairs, minipeft.encode_pairs(pairs, tokenizer), plain, tuned)
    os.chdir(here)


def run_steps(model: Any, batches: Any, config: Any, state: Any) -> list[minipeft.Step]:
    return list(minipeft.train(model, batches, config, state))


def train_on(p: Place) -> Callable[..., object]:
    def call(ids: Any, labels: Any, documents: Any) -> object:
        batch = minipeft.Batch(ids, labels, documents)
        return run_steps(p.tuned(), [batch], minipeft.TrainConfig(steps=1), None), minipeft.evaluate(p.tuned(), [batch])

    return call


def with_bank(p: Place, act: Callable[[minipeft.AdapterBank, Any], object]) -> Callable[[Any], object]:
    def call(given: Any) -> object:
        bank = minipeft.AdapterBank(p.plain())
        bank.load("a", p.folder / "adapter")
        return act(bank, given)

    return call


def use(bank: minipeft.AdapterBank, names: Any) -> object:
    with bank.use(names):
        return bank.model(torch.ones(len(names), 3).long())


def with_set(p: Place, act: str) -> Callable[..., object]:
    def call(**given: Any) -> object:
        adapters = minipeft.AdapterSet(p.plain())
        adapters.add("a", minipeft.LoRAConfig(2))
        return getattr(adapters, act)(**given)

    return call


def disable(model: Any) -> object:
    with minipeft.disabled(model):
        return model(torch.ones(1, 3).long())


TEXT_PAIR = {"predictions": ["a b c d", "e"], "references": ["a b c d", ["e", "f"]]}
Sound = Callable[[Place], tuple[Callable[..., object], dict[str, Any]]]
FUNCTIONS: dict[str, Sound] = {
    "load_model": lambda p: (minipeft.load_model, {"source": p.folder / "model", "dtype": None, "device": "cpu",
                                                   "revision": None, "legacy_bin": False}),
    "save_model": lambda p: (minipeft.save_model, {"model": p.plain(), "folder": "saved"}),
    "load_tokenizer": lambda p: (minipeft.load_tokenizer, {"source": p.folder / "model", "revision": None}),
    "add_adapter": lambda p: (minipeft.add_adapter, {"model": p.plain(), "config": minipeft.LoRAConfig(2),
                                                     "tokenizer": p.tokenizer, "seed": 0}),
    "add_adapter of a text": lambda p: (lambda tokenizer, text, init: minipeft.add_adapter(
        p.plain(), minipeft.PrefixConfig(3, text=text, init=init), tokenizer),
        {"tokenizer": p.tokenizer, "text": "abc", "init": "text"}),
    "remove_adapter": lambda p: (minipeft.remove_adapter, {"model": p.tuned()}),
    "merge_adapter": lambda p: (minipeft.merge_adapter, {"model": p.tuned()}),
    "merge_adapter with prompts": lambda p: (lambda **given: minipeft.merge_adapter(p.tuned(), **given), {
        "check": ["a", "bc"], "tokenizer": p.tokenizer, "new_tokens": 2, "dtype": None, "dequantize": False}),
    "save_adapter": lambda p: (minipeft.save_adapter, {"model": p.tuned(), "folder": "adapter",
                                                       "baked": True}),
    "load_adapter": lambda p: (minipeft.load_adapter, {"model": p.plain(), "source": p.folder / "adapter",
                                                       "trainable": False}),
    "AdapterBank": lambda p: (minipeft.AdapterBank, {"model": p.plain()}),
    "AdapterBank.load": lambda p: (minipeft.AdapterBank(p.plain()).load, {"name": "a", "folder": p.folder / "adapter"}),
    "AdapterBank.drop": lambda p: (with_bank(p, minipeft.AdapterBank.drop), {"given": "a"}),
    "AdapterBank.size": lambda p: (with_bank(p, minipeft.AdapterBank.size), {"given": "a"}),
    "AdapterBank.use": lambda p: (with_bank(p, use), {"given": ["a", None]}),
    "disabled": lambda p: (disable, {"model": p.tuned()}),
    "AdapterSet": lambda p: (minipeft.AdapterSet, {"model": p.plain()}),
    "AdapterSet.load": lambda p: (with_set(p, "load"), {"name": "b", "source": p.folder / "adapter", "trainable": True}),
    "AdapterSet.switch": lambda p: (with_set(p, "switch"), {"name": "a"}),
    "AdapterSet.combine": lambda p: (with_set(p, "combine"), {"name": "b", "weights": {"a": 0.5}, "how": "svd",
                                                              "rank": 2}),
    "Pair": lambda p: (minipeft.Pair, {"intent": "a", "snippet": "b", "question_id": 3, "line": 1}),
    "load_pairs": lambda p: (minipeft.load_pairs, {"source": p.folder / "pairs.jsonl", "split": "train",
                                                   "longest_field": 100}),
    "encode_pairs": lambda p: (minipeft.encode_pairs, {"pairs": p.pairs, "tokenizer": p.tokenizer,
                                                       "template": "{intent}:"}),
    "split_by_question": lambda p: (split_by_question, {"pairs": p.pairs, "held_out": 2, "seed": 0}),
    "format_prompt": lambda p: (format_prompt, {"intent": "a", "template": "{intent}"}),
    "pack": lambda p: (lambda **given: minipeft.pack(**given)[0], {
        "examples": p.examples, "tokenizer": p.tokenizer, "length": 48, "batch": 2, "virtual_tokens": 0, "seed": 0,
        "loss_mask": "all", "isolate": True, "shuffle": True}),
    "Batch": lambda p: (train_on(p), vars(p.batch())),
    "train": lambda p: (run_steps, {"model": p.tuned(), "batches": [p.batch()], "config": minipeft.TrainConfig(steps=1),
                                    "state": None}),
    "evaluate": lambda p: (minipeft.evaluate, {"model": p.tuned(), "batches": [p.batch()]}),
    "TrainState": lambda p: (minipeft.TrainState, {"model": p.tuned()}),
    "learning_rate_at": lambda p: (lambda **given: learning_rate_at(3, minipeft.TrainConfig(steps=9, **given)), {
        "warmup": 0.1, "decay": "linear", "learning_rate": 0.1}),
    "generate": lambda p: (minipeft.generate, {"model": p.plain(), "tokenizer": p.tokenizer, "prompts": ["a", "bc"],
                                               "config": minipeft.GenerateConfig(2), "adapters": None}),
    "answer": lambda p: (lambda **given: list(answer(p.plain(), p.tokenizer, **given)), {
        "prompts": ["a", "bc"], "config": minipeft.GenerateConfig(2), "only": None}),
    "generate by config": lambda p: (lambda prompts, **given: minipeft.generate(
        p.plain(), p.tokenizer, prompts, minipeft.GenerateConfig(**given)), {
        "prompts": ["a"], "max_new_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 0, "stop": ("x",), "batch": 2}),
    "bleu": lambda p: (minipeft.bleu, {**TEXT_PAIR, "tokenize": "conala", "smooth": None, "smooth_value": None}),
    "sentence_bleu": lambda p: (sentence_bleu, {"prediction": "a b", "references": ["a b"], "tokenize": "13a",
                                                "smooth": "add-k", "smooth_value": 1.0, "effective_order": True}),
    "count_pairs": lambda p: (count_pairs, {**TEXT_PAIR, "tokenize": "none"}),
    "codebleu": lambda p: (minipeft.codebleu, {**TEXT_PAIR, "mode": "strict", "weights": (0.25,) * 4,
                                               "aggregate": "corpus"}),
    "chrf": lambda p: (chrf, dict(TEXT_PAIR)),
    "score_texts": lambda p: (score_texts, {**TEXT_PAIR, "questions": [1, 2], "hit_limit": [True, False]}),
    "bootstrap_bleu": lambda p: (bootstrap_bleu, {"runs": [np.ones((3, 10), dtype=np.int64)], "base": None,
                                                  "resamples": 50, "confidence": 0.9, "seed": 0}),
    "is_exact": lambda p: (is_exact, {"prediction": "a", "references": ["a"]}),
    "is_valid_python": lambda p: (is_valid_python, {"text": "x = 1"}),
    "is_repeated": lambda p: (is_repeated, {"text": "a a a a a"}),
    "read_answers": lambda p: (read_answers, {"file": p.folder / "answers.jsonl"}),
    "fetch": lambda p: (lambda source, revision: fetch(source, ["config.json"], revision=revision), {
        "source": p.folder / "model", "revision": None}),
    "run_config": lambda p: (run_config, {"method": "lora", "model": "demo", "data": "demo", "rank": 2, "epochs": 1.0,
                                          "length": 64, "dtype": None, "targets": "c_attn", "seed": 1}),
    "Tokenizer.encode": lambda p: (p.tokenizer.encode, {"text": "abc", "bos": True}),
    "Tokenizer.encode_all": lambda p: (p.tokenizer.encode_all, {"texts": ["abc"], "bos": True}),
    "Tokenizer.decode": lambda p: (p.tokenizer.decode, {"ids": [5, 6], "skip_special": True}),
    "Tokenizer.with_eos": lambda p: (p.tokenizer.with_eos, {"token": "a"}),
    "Decoder": lambda p: (p.plain(), {"ids": torch.ones(2, 8).long(), "documents": None}),
    "Decoder.loss": lambda p: (p.plain().loss, {"ids": torch.ones(2, 8).long(), "labels": torch.ones(2, 8).long(),
                                                "documents": torch.zeros(2, 8).long()}),
    "Decoder.new_cache": lambda p: (p.plain().new_cache, {"rows": 2, "length": 8}),
}  # fmt: skip
RECORDS = {"AdapterReport", "Step", "InputError"}  # what is returned or raised, never asked for
KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    **{method.config.__name__: (method.config, {}) for method in METHODS.values()},
    "TrainConfig": (minipeft.TrainConfig, {}),
    "GenerateConfig": (minipeft.GenerateConfig, {}),
    "PackConfig": (PackConfig, {}),
    "ModelConfig": (ModelConfig, {"source": "x"}),
    "DataConfig": (DataConfig, {"source": "x"}),
    "StudyConfig": (StudyConfig, {}),
}


def short(name: str, each: int) -> Any:
    """The number of examples, and the seed of this test."""

    def wrap(test: Any) -> Any:
        bounds = settings(
            max_examples=max(1, round(each * SCALE)),
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        return seed(SEED)(bounds(test))

    return wrap


def outcome(name: str, call: Callable[..., object], given_arguments: dict[str, Any]) -> bool:
    """Whether the call returned a result; False for an InputError. Any other exception fails the test."""
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        call(**given_arguments)
        sound = True
    except InputError as error:
        assert len(str(error)) < 5_000
        assert "\n" not in str(error)
        sound = False
    except BaseException as error:
        error.add_note(f"{name}(**{str(given_arguments)[:2000]}), MINIPEFT_SEED={SEED}")
        raise
    assert time.process_time() - start < SECONDS, (name, str(given_arguments)[:2000])
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < BYTES, (name, given_arguments)
    return sound


def replace_some(sound: dict[str, Any], data: st.DataObject) -> dict[str, Any]:
    """Replace one to three arguments by odd values."""
    names = data.draw(st.lists(st.sampled_from(sorted(sound)), min_size=1, max_size=3, unique=True))
    return sound | {name: data.draw(ODD) for name in names}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_gives_a_result_or_an_input_error(name: str, place: Place) -> None:
    call, sound = FUNCTIONS[name](place)
    assert outcome(name, call, sound), "the control"

    @short(name, CALLS_EACH)
    @given(data=st.data())
    def try_many(data: st.DataObject) -> None:
        call, sound = FUNCTIONS[name](place)
        outcome(name, call, replace_some(sound, data))

    torch.set_grad_enabled(True)
    try_many()


@pytest.mark.parametrize("name", KINDS)
def test_a_config_is_made_or_refused(name: str, place: Place) -> None:
    kind, needed = KINDS[name]
    fields = {field.name: None for field in dataclasses.fields(kind)}
    assert outcome(name, kind, needed)

    @short(name, CONFIGS_EACH)
    @given(data=st.data())
    def try_many(data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3, unique=True))
        outcome(name, kind, needed | {field: data.draw(ODD) for field in names})

    if fields:
        try_many()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_config_json_is_read_or_refused(family: str, place: Place) -> None:
    sound = dict(smallest(family))
    JSON = st.recursive(
        st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
        max_leaves=4,
    )
    keys = sorted({*sound, "rope_scaling", "rope_parameters", "rope_theta", "sliding_window", "head_dim", "layer_types",
                   "hidden_act", "partial_rotary_factor", "bos_token_id", "eos_token_id", "quantization_config"})  # fmt: skip
    read = lambda given_json: parse_config(FAMILIES[family].config, given_json)
    assert outcome(family, read, {"given_json": sound})

    @short(family, CONFIGS_EACH // 2)
    @given(data=st.data())
    def try_many(data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3, unique=True))
        outcome(family, read, {"given_json": sound | {name: data.draw(JSON) for name in names}})

    try_many()


@cache
def smallest(family: str) -> dict[str, Any]:
    """The config.json of the family's defaults."""
    return {"model_type": family, **FAMILIES[family].config().to_json()}


def test_every_public_name_is_tried() -> None:
    tried = {name.split()[0] for name in FUNCTIONS} | set(KINDS) | RECORDS
    assert set(minipeft.__all__) <= tried
    assert all(callable(getattr(minipeft, name)) for name in minipeft.__all__)


def test_there_are_enough(capsys: pytest.CaptureFixture[str]) -> None:
    count = len(FUNCTIONS) * CALLS_EACH + len(KINDS) * CONFIGS_EACH + len(FAMILIES) * (CONFIGS_EACH // 2)
    with capsys.disabled():
        print(f"\n{round(count * SCALE):,} calls with odd arguments, MINIPEFT_SEED={SEED}")
    assert count >= 2_000
