"""Copies, processes and threads: deepcopy and pickle of model, state and tokenizer; trainings side by side.

Each method of both families is copied while it holds an adapter, and the copy trains to the same bits. Two trainings in
two threads give the bits that each gives alone. A forked process works with one thread, and is refused with several.
"""

import copy
import os
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import minipeft
from minipeft.errors import InputError
from minipeft.models import Decoder
from minipeft.training.loop import TrainState, train
from tests.small import write_pairs, write_small_model

CONFIGS: dict[str, Any] = {
    "full": minipeft.FullConfig(),
    "lora": minipeft.LoRAConfig(rank=2, dropout=0.2),
    "dora": minipeft.LoRAConfig(rank=2, dora=True),
    "pissa": minipeft.LoRAConfig(rank=2, init="pissa"),
    "ia3": minipeft.IA3Config(),
    "vera": minipeft.VeRAConfig(rank=4),
    "ln_tuning": minipeft.LNTuningConfig(),
    "prefix": minipeft.PrefixConfig(3, reparam=4),
    "gated prefix": minipeft.PrefixConfig(3, gate=True),
    "prompt": minipeft.PromptConfig(3),
}
WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda held: pickle.loads(pickle.dumps(held)),  # of an object of our own
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("copies")
    for family in ("gpt2", "llama"):
        write_small_model(place / family, family)
    write_pairs(place / "pairs.jsonl", 8)
    return place


def tuned(folder: Path, method: str = "lora", family: str = "gpt2") -> Decoder:
    model = minipeft.load_model(folder / family)
    minipeft.add_adapter(model, CONFIGS[method], minipeft.load_tokenizer(folder / family))
    return model


def losses(folder: Path, model: Decoder, state: TrainState | None = None, steps: int = 2) -> list[float]:
    tokenizer = minipeft.load_tokenizer(folder / "gpt2")
    examples = minipeft.encode_pairs(minipeft.load_pairs(folder / "pairs.jsonl"), tokenizer)
    batches = minipeft.pack(examples, tokenizer, length=64, batch=2, virtual_tokens=model.virtual_tokens)
    return [step.loss for step in train(model, batches, minipeft.TrainConfig(steps=steps), state)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", CONFIGS)
def test_a_copy_of_a_model_trains_to_the_same_bits(folder: Path, method: str, family: str, way: str) -> None:
    model = tuned(folder, method, family)
    copied = WAYS[way](model)
    assert (copied.lm_head.weight is copied.embedding.weight) == (model.lm_head.weight is model.embedding.weight)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    trained = losses(folder, copied)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items()), "a copy shares no tensor"
    assert trained == losses(folder, model)
    minipeft.remove_adapter(copied)


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_of_model_and_state_goes_on(folder: Path, way: str) -> None:
    model = tuned(folder)
    state = TrainState(model)
    config, kept = minipeft.TrainConfig(steps=4), []
    tokenizer = minipeft.load_tokenizer(folder / "gpt2")
    examples = minipeft.encode_pairs(minipeft.load_pairs(folder / "pairs.jsonl"), tokenizer)
    batches = minipeft.pack(examples, tokenizer, length=64, batch=2)
    for step in train(model, batches, config, state):
        kept.append(step.loss)
        if step.number == 2:
            copied, state_copy = WAYS[way]((model, state))
    assert [step.loss for step in train(copied, batches, config, state_copy)] == kept[2:]


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_of_a_bank_is_closed_as_the_bank_is(folder: Path, way: str) -> None:
    model = minipeft.load_model(folder / "gpt2")
    model.embedding.weight.requires_grad_(False)
    minipeft.AdapterBank(model)
    copied = WAYS[way](model)
    copied.adapter.close()
    assert copied.adapter is None
    trainable = {name: p.requires_grad for name, p in copied.named_parameters()}
    assert trainable.pop("transformer.wte.weight") is False
    assert all(trainable.values())


@pytest.mark.parametrize("way", WAYS)
def test_special_tokens_stay_text_in_a_copy_of_a_tokenizer(folder: Path, way: str) -> None:
    tokenizer = minipeft.load_tokenizer(folder / "gpt2")
    ids = tokenizer.encode("a<|endoftext|>")
    assert len(ids) == len("a<|endoftext|>")
    assert WAYS[way](tokenizer).encode("a<|endoftext|>") == ids


def test_two_trainings_in_two_threads_draw_what_each_draws_alone(folder: Path) -> None:
    """torch has one generator for all threads: the dropout of one would come from the other's seed."""
    names = ["gpt2", "llama", "gpt2"]
    alone = [losses(folder, tuned(folder, family=name), steps=12) for name in names]
    found: dict[int, list[float]] = {}
    models = [tuned(folder, family=name) for name in names]
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: losses(folder, models[i], steps=12)})) for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(3)] == alone


def test_a_second_training_within_a_step_of_the_first_is_refused(folder: Path) -> None:
    model = tuned(folder)
    said: list[str] = []

    def intrude(*_: object) -> None:
        def run() -> None:
            try:
                losses(folder, model)
            except InputError as error:
                said.append(str(error))

        other = threading.Thread(target=run)
        other.start()
        other.join()

    handle = model.blocks[0].register_forward_pre_hook(intrude)
    next(iter(train(model, [batch_of(folder)], minipeft.TrainConfig(steps=1))))
    handle.remove()
    assert said == ["step 1: another training of this model is within a step"]
    losses(folder, model)


def batch_of(folder: Path) -> minipeft.Batch:
    tokenizer = minipeft.load_tokenizer(folder / "gpt2")
    examples = minipeft.encode_pairs(minipeft.load_pairs(folder / "pairs.jsonl"), tokenizer)
    return minipeft.pack(examples, tokenizer, length=64, batch=2)[0]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_process_trains_with_one_thread_and_is_refused_with_two(folder: Path, threads: int) -> None:
    """OpenMP's threads are not copied by fork: the first parallel operator of the child would wait for ever."""
    model, before = tuned(folder), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.randn(400, 400) @ torch.randn(400, 400)  # now there are threads
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                text = repr(losses(folder, model))
            except InputError as error:
                text = str(error)
            os.write(write, text.encode())
            os._exit(0)
        os.close(write)
        deadline = time.monotonic() + 60
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.kill(child, 9)
                os.waitpid(child, 0)
                pytest.fail("the child hangs")
            time.sleep(0.02)
        said = os.read(read, 10_000).decode()
        os.close(read)
        if threads == 1:
            assert said == repr(losses(folder, model))
        else:
            assert said.startswith("process: was forked, and torch has 2 threads")
    finally:
        torch.set_num_threads(before)
