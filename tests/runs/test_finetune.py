"""The output and files of a run; tests/test_survival.py covers interruptions."""

import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

import minipeft
from minipeft.data import token_file
from minipeft.models.quantized import find_quantization
from minipeft.runs import estimates, preparation
from minipeft.runs import finetune as tuning
from minipeft.runs.answers import AnswersConfig, load_tuned
from minipeft.runs.checkpoints import Run
from minipeft.runs.config import RunConfig, run_config
from minipeft.runs.finetune import finetune
from tests.small import write_pairs, write_small_model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(estimates, "probe_flops", lambda *_: 1e9)
    torch.set_num_threads(1)
    write_small_model(tmp_path / "model", layers=1)
    write_pairs(tmp_path / "pairs.jsonl", 8)
    return tmp_path


def config(folder: Path, method: str = "lora", **changes: object) -> RunConfig:
    given: dict[str, object] = {"model": str(folder / "model"), "data": str(folder / "pairs.jsonl")}
    given |= {"steps": 2, "length": 64, "held_out": 2} | ({"rank": 2} if method == "lora" else {})
    return run_config(method, **given | changes)  # type: ignore[arg-type]


def test_result_holds_what_is_the_same_and_timing_what_is_not(folder: Path) -> None:
    first = finetune(config(folder), folder / "a", say=lambda _: None)
    finetune(config(folder), folder / "b", say=lambda _: None)
    assert (folder / "a/result.json").read_bytes() == (folder / "b/result.json").read_bytes()
    result, timing = (json.loads((folder / "a" / name).read_text()) for name in ("result.json", "timing.json"))
    assert first == result | timing
    assert set(timing) == {"resumed_at", "train_seconds", "tokens_per_second", "peak_memory_bytes"}
    log = [json.loads(line) for line in (folder / "a/log.jsonl").read_text().splitlines()]
    assert result["loss"] == log[-1]["loss"]
    assert result["dev_loss"] == log[-1]["dev_loss"]


class SlowClock:
    """A clock that moves one second at each reading."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now


def test_the_seconds_of_a_resumed_run_count_what_came_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after step 5, of which the last save was at step 4: steps 1 to 4 count from before, step 5 once."""
    given = config(folder, steps=8, save_every=2)
    monkeypatch.setattr(tuning, "time", SlowClock())
    whole = finetune(given, folder / "whole", say=lambda _: None)
    written = Run.log

    def die(run: Run, entry: dict[str, object]) -> None:
        if entry["step"] == 5:
            raise KeyboardInterrupt
        written(run, entry)

    for file in (None, "timing.json"):
        out, said = folder / f"part-{file}", list[str]()
        with monkeypatch.context() as patch:
            patch.setattr(Run, "log", die)
            with pytest.raises(KeyboardInterrupt):
                finetune(given, out, say=lambda _: None)
        assert len(json.loads((out / "timing.json").read_text())["saves"]) == 2
        if file:
            (out / file).write_text("{")
        resumed = finetune(given, out, resume=True, say=said.append)
        assert resumed["resumed_at"] == 4
        assert resumed["train_seconds"] == (4.0 if file else whole["train_seconds"]) == (4.0 if file else 8.0)
        assert any("has no time for step 4" in line for line in said) is bool(file)
        assert resumed["tokens_per_second"] == pytest.approx(whole["tokens_per_second"], rel=0.5 if file else 1e-12)


def test_bad_input_leaves_no_folder_behind(folder: Path) -> None:
    for changes in ({"data": "nope.json"}, {"model": "nope/"}, {"targets": ("nope",)}):
        given = config(folder).change(**changes)
        with pytest.raises(minipeft.InputError):
            finetune(given, folder / "out", say=lambda _: None)
        assert not (folder / "out").exists()
    (folder / "mine").mkdir()
    with pytest.raises(minipeft.InputError):
        finetune(config(folder, data="nope.json"), folder / "mine", say=lambda _: None)
    assert (folder / "mine").is_dir()  # it was there before
    with pytest.raises(minipeft.InputError):
        finetune(config(folder, targets=("nope",)), folder / "mine", say=lambda _: None)
    finetune(config(folder), folder / "mine", say=lambda _: None)  # neither resume nor overwrite


def test_pairs_held_out_and_trained_on_are_counted(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    twins = [row | {"question_id": 100 + number} for number, row in enumerate(rows)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + twins))
    said: list[str] = []
    finetune(config(folder, held_out=1), folder / "out", say=said.append)
    assert any(line.startswith("warning: 1 of the 1 pairs held out are also trained on") for line in said)


def test_a_token_cache_changes_no_byte(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run encodes nothing, and a resumed one may name another folder."""
    said: list[str] = []
    monkeypatch.setattr(preparation, "LONG_ENCODING", -1.0)
    finetune(config(folder), folder / "plain", say=said.append)
    assert "note: encoding took 0 s; --token-cache FOLDER keeps the tokens for the next run" in said
    finetune(config(folder, token_cache=str(folder / "cache")), folder / "first", say=said.append)
    monkeypatch.setattr(token_file, "encode_stream", None)
    finetune(config(folder, token_cache=str(folder / "cache")), folder / "second", say=said.append)
    assert sum("encoding took" in line for line in said) == 1
    for name in ("log.jsonl", "result.json", "adapter/adapter_model.safetensors"):
        wanted = (folder / "plain" / name).read_bytes()
        assert [(folder / run / name).read_bytes() for run in ("first", "second")] == [wanted] * 2
    (folder / "second/result.json").unlink()
    finetune(config(folder, token_cache=str(folder / "cache") + "/"), folder / "second", resume=True, say=said.append)
    assert (folder / "second/result.json").read_bytes() == (folder / "plain/result.json").read_bytes()


def test_deterministic_is_put_back_and_is_part_of_what_a_run_is(folder: Path) -> None:
    finetune(config(folder, deterministic=True), folder / "out", say=lambda _: None)
    assert not torch.are_deterministic_algorithms_enabled()
    assert json.loads((folder / "out/run.json").read_text())["arguments"]["deterministic"] is True


def test_it_runs_in_a_thread(folder: Path) -> None:
    """A thread other than the main one cannot set signal handlers."""
    done: list[object] = []
    thread = threading.Thread(target=lambda: done.append(finetune(config(folder), folder / "out", say=lambda _: None)))
    thread.start()
    thread.join()
    assert len(done) == 1


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt"])
def test_the_adapter_on_disk_is_the_one_that_was_trained(method: str, folder: Path) -> None:
    extra = {} if method == "lora" else {"virtual_tokens": 3}
    result = finetune(config(folder, method=method, **extra), folder / "out", say=lambda _: None)
    model = minipeft.load_model(folder / "model")
    minipeft.load_adapter(model, folder / "out/adapter")
    given = config(folder)
    _, dev = tuning.pack_data(given, model, tuning.prepare(given.model, given.data), say=lambda _: None)
    assert minipeft.evaluate(model, dev) == pytest.approx(result["dev_loss"], rel=1e-6)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_run_on_a_quantized_base_resumes_to_the_bit_and_its_adapter_answers(
    folder: Path, quantize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(folder, quantize=quantize, steps=4, save_every=2, dropout=0.1)
    whole = finetune(given, folder / "whole", say=lambda _: None)

    whole_training = tuning.train

    def cut_off(*arguments: Any) -> Iterator[Any]:
        yield from itertools.islice(whole_training(*arguments), 3)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "train", cut_off)
        with pytest.raises(KeyboardInterrupt):
            finetune(given, folder / "parts", say=lambda _: None)
    again = finetune(given, folder / "parts", resume=True, say=lambda _: None)
    assert again["resumed_at"] == 2
    assert again["loss"] == whole["loss"]
    name = "adapter_model.safetensors"
    assert (folder / "whole/adapter" / name).read_bytes() == (folder / "parts/adapter" / name).read_bytes()
    model, _ = load_tuned(AnswersConfig(given.model, adapter=folder / "whole/adapter"))
    assert find_quantization(model) == quantize
    plain = finetune(given.change(quantize=None), folder / "plain", say=lambda _: None)
    assert plain["loss"] != whole["loss"]
    with pytest.raises(minipeft.InputError, match="quantize"):
        finetune(given.change(quantize=None), folder / "parts", resume=True, say=lambda _: None)


def test_full_tuning_of_a_quantized_base_is_refused(folder: Path) -> None:
    with pytest.raises(minipeft.InputError, match="weights themselves, and quantized weights cannot be trained"):
        config(folder, "full", quantize="nf4")


def test_a_tokenizer_with_new_tokens_needs_a_larger_vocabulary(folder: Path) -> None:
    """The token's row exists from add_adapter on: it is trained, saved, loaded and merged."""
    file = folder / "model/tokenizer.json"
    backend = Tokenizer.from_file(str(file))
    backend.add_special_tokens(["<plus>"])
    backend.save(str(file))
    rows = [{"text": f"x <plus> {n}"} for n in range(8)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(minipeft.InputError, match=r"'<plus>' has id 257, but .* has 257 tokens.*--vocabulary N"):
        finetune(config(folder, template="<plus>{text}"), folder / "out", say=lambda _: None)
    assert not (folder / "out").exists()
    given = config(folder, vocabulary=258, template="<plus>{text}", held_out=0)
    finetune(given, folder / "out", say=lambda _: None)
    answers = {}
    for merge in (False, True):
        asked = AnswersConfig(given.model, adapter=folder / "out/adapter", merge=merge)
        model, tokenizer = load_tuned(asked)
        assert tokenizer.size == model.config.vocab_size == 258
        greedy = minipeft.GenerateConfig(max_new_tokens=3, temperature=0.0)
        answers[merge] = minipeft.generate(model, tokenizer, ["x"], greedy)
    assert answers[False] == answers[True]
    row = minipeft.load_model(folder / "model").embedding.weight.mean(0)
    assert not torch.equal(model.embedding.weight[257], row), "the new token's row did not train"
