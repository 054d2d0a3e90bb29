"""Every bad input through the command line, in one process: exit 2, one line that names file and field, at once.

The tables of what is wrong stand beside the tests of the parts (tests/bad_inputs.py, tests/data, tests/adapters); here
each of their cases goes through `minipeft train` or `minipeft generate`, and the flags have a table of their own.
"""

import json
import os
import re
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minipeft import cli
from minipeft.adapters import LoRAConfig, add_adapter
from minipeft.adapters.peft_format import save_adapter
from minipeft.models import FAMILIES
from minipeft.models.checkpoint import save_model
from minipeft.runs import estimates
from tests.adapters.conftest import TINY
from tests.adapters.test_peft_format import BAD as ADAPTERS
from tests.data.test_examples import CASES as PAIRS
from tests.data.test_tokens import CASES as TOKENIZERS
from tests.small import write_pairs, write_small_model, write_tokenizer

MEMORY = 100 * 2**20  # bytes beyond what the sound run takes
SECONDS = 2.0


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "probe_flops", lambda *_: 1e9)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sound model, pairs, and an adapter."""
    folder = tmp_path_factory.mktemp("sound")
    write_small_model(folder / "model", layers=1)
    write_pairs(folder / "pairs.jsonl", 8)
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, seconds: float = SECONDS) -> str:
    """Run the command; hold it to the form of all errors, and return what it said."""
    capsys.readouterr()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        status: Any = cli.main([str(part) for part in arguments])
    except SystemExit as left:
        status = left.code
    took = time.process_time() - start
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    lines = capsys.readouterr().err.splitlines()
    assert status == 2, lines
    assert not any("Traceback" in line for line in lines)
    said = [line for line in lines if line.startswith("error: ")]
    assert said == lines[-1:], "one line, and it is the last"
    assert took < seconds
    assert grown < MEMORY
    return said[0].removeprefix("error: ")


def train(folder: Path, *more: object, **changes: object) -> list[object]:
    given = {
        "model": folder / "model",
        "data": folder / "pairs.jsonl",
        "out": folder / "out",
        "steps": 1,
        "length": 64,
        "held-out": 2,
        **changes,
    }
    return ["train", *(part for name, value in given.items() for part in (f"--{name}", value)), *more]


def test_the_sound_one_trains(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The control: what is refused below is refused for its fault."""
    assert cli.main([str(part) for part in train(sound)]) == 0
    assert "1 steps" in capsys.readouterr().out
    shutil.rmtree(sound / "out")


def test_checkpoints(bad_checkpoint: Any, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """C, S and I: config.json, safetensors, index."""
    bad_checkpoint.make(tmp_path / "model")
    if not (tmp_path / "model/tokenizer.json").exists():
        write_tokenizer(tmp_path / "model")
    said = refused(capsys, *train(sound, model=tmp_path / "model", out=tmp_path / "out"))
    assert said.startswith(str(tmp_path / "model"))
    assert all(part in said for part in bad_checkpoint.says if not part.startswith("found: "))
    assert not [p for p in (tmp_path / "out").rglob("*") if p.suffix == ".safetensors"]


NO_FORM = {
    "D11 no snippet": "FILE:2: is of no known form (the row has: intent). A row holds messages, intent and snippet",
    "D11 other names": "FILE:1: is of no known form (the row has: a). A row holds messages, intent and snippet",
}


@pytest.mark.parametrize("case", PAIRS)
def test_pairs(case: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """D: JSON and JSON lines. `train` takes rows of several forms, and names a row that is of none."""
    raw, text = PAIRS[case]
    text = NO_FORM.get(case, text)
    (tmp_path / "data.jsonl").write_bytes(raw)
    said = refused(capsys, *train(sound, data=tmp_path / "data.jsonl", out=tmp_path / "out"))
    assert said.startswith(text.replace("FILE", str(tmp_path / "data.jsonl")))


@pytest.fixture
def talker(assets: Path, tmp_path: Path) -> Path:
    """A model folder with the tokenizer that the table of bad tokenizers spoils."""
    folder = write_small_model(tmp_path / "model", layers=1)
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 512, "eos_token_id": 2}
    (folder / "tokenizer_config.json").unlink()
    family = FAMILIES["gpt2"]
    model = family.decoder(family.config(vocab_size=512, n_positions=96, n_embd=16, n_layer=1, n_head=2))
    model.initialize(torch.Generator().manual_seed(0))
    save_model(model, folder)
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(assets / "fixtures/stories260K/tokenizer.json", folder / "tokenizer.json")
    return folder


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers(case: str, talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """T: tokenizer.json and what stands beside it."""
    spoil, text = TOKENIZERS[case]
    spoil(talker)
    rows = [{"intent": "fine", "snippet": "fine", "question_id": n} for n in range(4)]
    rows[1]["snippet"] = "a" * 60 + "b"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = refused(capsys, *train(tmp_path))
    assert str(talker) in said
    assert re.sub(r"text \d+", "", text) in re.sub(r"text \d+", "", said)  # which text it is depends on the command


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama and an adapter for it, as the table of bad adapters expects them."""
    folder = tmp_path_factory.mktemp("tuned")
    config, decoder = FAMILIES["llama"].config, FAMILIES["llama"].decoder
    model = decoder(config(**TINY["llama"] | {"vocab_size": 257}))
    model.initialize(torch.Generator().manual_seed(0))
    save_model(model.eval(), folder / "model")
    write_tokenizer(folder / "model")
    add_adapter(model, LoRAConfig(4, 8.0, targets=("q_proj", "v_proj")))
    save_adapter(model, folder / "adapter")
    return folder


def answer(folder: Path, adapter: Path, *more: object) -> list[object]:
    return ["generate", "--model", folder / "model", "--adapter", adapter, "--max-new-tokens", 2, *more, "x"]


def test_the_sound_adapter_answers(tuned: Path) -> None:
    assert cli.main([str(part) for part in answer(tuned, tuned / "adapter", "--raw")]) == 0


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters(
    case: str, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A and W: adapter_config.json and the adapter's tensors."""
    spoil, text = ADAPTERS[case]
    shutil.copytree(tuned / "adapter", tmp_path / "adapter")
    spoil(tmp_path / "adapter")
    monkeypatch.setattr("minipeft.adapters.patterns.DEADLINE", 0.5)
    said = refused(capsys, *answer(tuned, tmp_path / "adapter", "--raw"))
    assert said.startswith(str(tmp_path / "adapter"))
    assert text in said


FLAGS: dict[str, tuple[list[str], str]] = {
    "L01 unknown flag": (["--stepz", "3"], "--stepz is not known. Did you mean --steps?"),
    "L01 abbreviated": (["--meth", "lora"], "--meth is not known. Did you mean --method?"),
    "L02 rate 0": (["--learning-rate", "0"], "learning_rate: 0.0 must be finite and > 0"),
    "L02 rate negative": (["--learning-rate=-1e-3"], "learning_rate: -0.001 must be finite and > 0"),
    "L02 rate NaN": (["--learning-rate", "nan"], "learning_rate: nan must be finite and > 0"),
    "L02 rate Inf": (["--learning-rate", "inf"], "learning_rate: inf must be finite and > 0"),
    "L02 no number": (["--learning-rate", "1e-3x"], "argument --learning-rate/--lr: invalid float value: '1e-3x'"),
    "L03 batch": (["--batch", "0"], "batch: 0 must be an integer >= 1"),
    "L03 steps": (["--steps", "-1"], "steps: -1 must be an integer >= 1"),
    "L03 steps a fraction": (["--steps", "1.5"], "argument --steps: invalid int value: '1.5'"),
    "L03 accumulate": (["--accumulate", "0"], "accumulate: 0 must be an integer >= 1"),
    "L03 epochs": (["--epochs", "0"], "epochs: 0.0 must be finite and > 0"),
    "L03 epochs Inf": (["--epochs", "inf"], "epochs: inf must be finite and > 0"),
    "L03 epochs NaN": (["--epochs", "nan"], "epochs: nan must be finite and > 0"),
    "L04 length": (["--length", "97"], "length: 97 exceeds the model's context of 96"),
    "L04 no room": (["--method", "prompt", "--virtual-tokens", "96", "--length", "96"],
                    "length: 96 virtual tokens leave no room"),
    "L04 length 0": (["--length", "0"], "length: 0 must be an integer >= 1"),
    "L07 resume and overwrite": (["--resume", "--overwrite"], "resume, overwrite: cannot go together"),
    "L10 cuda": (["--device", "cuda"], "device: 'cuda' cannot be used: "),
    "L10 no device": (["--device", "abacus"], "device: 'abacus' cannot be used: "),
    "L10 meta": (["--device", "meta"], "device: 'meta' cannot be used"),
    "L10 dtype": (["--dtype", "fp8"], "dtype: 'fp8' is not known (fp32, bf16)"),
    "L11 seed": (["--seed", "-1"], "seed: -1 must be an integer in [0, 2^63)"),
    "L11 seed vast": (["--seed", str(2**63)], f"seed: {2**63} must be an integer in [0, 2^63)"),
    "L13 method": (["--method", "lorra"], "method: 'lorra' is not known (full, lora, dora, rslora, pissa, ia3, "),
    "L13 targets": (["--targets", "nope"], "targets: no linear layer is named 'nope'; this model has "),
    "L13 targets empty": (["--targets", ""], "targets: "),
    "L13 rank": (["--rank", "0"], "rank: 0 must be an integer >= 1"),
    "L13 rank vast": (["--rank", str(10**15)], "the disk has "),
    "L13 alpha": (["--alpha", "nan"], "alpha: nan must be finite and > 0"),
    "L13 dropout": (["--dropout", "1.5"], "dropout: 1.5 must be in [0, 1)"),
    "L13 rank of a prefix": (["--method", "prefix", "--rank", "3"], "rank: has no effect with prefix (lora"),
    "L13 targets of full tuning": (["--method", "full", "--targets", "nope"], "targets: has no effect with full (lora"),
    "L13 init of LoRA": (["--init", "banana"], "init: 'banana' is not known (uniform, gaussian, orthogonal,"),
    "L13 contradiction": (["--method", "dora", "--no-dora"], "dora: False contradicts method dora"),
    "L13 init": (["--method", "prefix", "--init", "magic"], "init: 'magic' "),
    "L13 virtual tokens": (["--method", "prefix", "--virtual-tokens", "0"], "virtual_tokens: 0 "),
    "L13 loss": (["--loss-mask", "some"], "loss_mask: 'some' is not known (all, response)"),
    "L14 save_every": (["--save-every", "0"], "save_every: 0 must be an integer >= 1"),
    "L14 evaluate_every": (["--evaluate-every", "0"], "evaluate_every: 0 must be an integer >= 1"),
    "L15 held out": (["--held-out", "8"], "held_out: cannot hold out 8 of 8 pairs"),
    "L15 held out negative": (["--held-out", "-1"], "held_out: -1 must be an integer >= 0"),
    "L16 threads": (["--threads", "0"], "threads: 0 must be an integer in [1, 1024]"),
    "L16 threads beyond reason": (["--threads", "1000000"], "threads: 1000000 must be an integer in [1, 1024]"),
    "L16 threads beyond integers": (["--threads", str(10**30)], "must be an integer in [1, 1024]"),
    "L17 batch without end": (["--batch", str(10**12)], "batch: 1000000000000 is beyond the limit of 1,048,576"),
    "L17 accumulate without end": (["--accumulate", str(10**12)], "accumulate: 1000000000000 is beyond the limit"),
    "L17 length without end": (["--length", str(10**12)], "length: 1000000000000 is beyond the limit of 1,048,576"),
    "L17 steps beyond integers": (["--steps", str(10**400)], "steps: an integer of 1329 bits must be an integer >= 1"),
    "L17 alpha beyond float32": (["--alpha", "1e300"], "alpha: 1e+300 must be finite and > 0 in float32"),
    "L17 rate that trains nothing": (["--lr", "1e-30"], "learning_rate: 1e-30 trains nothing"),
    "L17 rank beyond torch": (["--rank", str(2**62)], "rank: takes "),
    "L18 text of half a character": (["--method", "prompt", "--text", "a\ud800"], "text: holds a lone surrogate, "),
    "L18 NUL in text": (["--method", "prefix", "--text", "a\0b"], "text: holds a NUL character at 1"),
    "L18 NUL in out": (["--out", "a\0b"], "out: 'a\\x00b': holds a NUL character at 1"),
    "L18 NUL in model": (["--model", "a\0b"], "model: holds a NUL character at 1"),
    "L18 out too long": (["--out", "a" * 300], "is too long for a path (4096 bytes, 255 for a name)"),
    "L18 model too long": (["--model", "a" * 5000], "is too long for a path"),
    "T19 eos": (["--eos-token", "<end>"], "'<end>' is not in the vocabulary"),
    "E02 revision of a folder": (["--revision", "v1"], "revision 'v1' was given, but this is a local folder"),
    "model absent": (["--model", "no/such/model"], "no/such/model: no such folder, and not a hub id"),
    "data absent": (["--data", "no.jsonl"], "no.jsonl: no such file"),
    "L06 out is a file": (["--out", __file__], f"{__file__}: is a file; the run needs a folder"),
    "L06 out in no folder": (["--out", "/proc/run"], "/proc/run: cannot write"),
}  # fmt: skip


@pytest.mark.parametrize("case", FLAGS)
def test_flags(case: str, sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """L: what is given to `train`; the last of two values of a flag counts."""
    more, text = FLAGS[case]
    if case == "L10 cuda" and torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    assert text in refused(capsys, *train(sound), *more)
    assert not (sound / "out/adapter").exists()
    shutil.rmtree(sound / "out", ignore_errors=True)


ANSWERING: dict[str, tuple[list[str], str]] = {
    "L12 beyond the context": (["--max-new-tokens", "999"], "999 new ones exceed the context, 96"),
    "L12 temperature": (["--temperature", "-1"], "temperature: -1.0 must be finite and >= 0"),
    "L12 temperature NaN": (["--temperature", "nan"], "temperature: nan must be finite and >= 0"),
    "L12 top_p 0": (["--top-p", "0"], "top_p: 0.0 must be in (0, 1]"),
    "L12 top_p 2": (["--top-p", "2"], "top_p: 2.0 must be in (0, 1]"),
    "L12 tokens": (["--max-new-tokens", "0"], "max_new_tokens: 0 must be an integer >= 1"),
    "L12 batch": (["--batch", "0"], "batch: 0 must be an integer >= 1"),
    "L12 stop": (["--stop", ""], "stop: a stop text is empty"),
    "L12 temperature next to 0": (["--temperature", "1e-45"], "temperature: 1e-45 must be 0 (greedy), or in [1e-06"),
    "L12 temperature vast": (["--temperature", "1e30"], "temperature: 1e+30 must be 0 (greedy), or in [1e-06"),
    "L12 top_p next to 0": (["--top-p", "1e-300"], "top_p: 1e-300 must be in (0, 1] in float32"),
    "L12 stop NUL": (["--stop", "\0"], "stop: holds a NUL character at 0"),
    "L12 blank": (["", "--raw"], "prompt 2: has no tokens: it is empty"),
    "L12 blank in the template": ([" "], "intent: is blank"),
    "no adapter": (["--adapter", "nowhere"], "nowhere/adapter_config.json: no such file"),
    "merge": (["--merge"], "merge_adapter: the model holds no adapter"),
    "prompt and data": (["--data", "pairs.jsonl"], "generate: give PROMPTs, or --data"),
}


@pytest.mark.parametrize("case", ANSWERING)
def test_flags_of_generate(case: str, tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more, text = ANSWERING[case]
    assert text in refused(capsys, "generate", "--model", tuned / "model", "x", *more)


STUDY: dict[str, tuple[list[str], str]] = {
    "device": (["--device", "abacus"], "device: 'abacus' cannot be used: "),
    "limit": (["--limit", "0"], "limit: 0 must be an integer >= 1"),
    "seeds": (["--seeds", str(10**400)], "seeds: an integer of 1329 bits must be an integer >= 1"),
    "out": (["--out", "a\0"], "out: 'a\\x00': holds a NUL character at 1"),
}


@pytest.mark.parametrize("case", STUDY)
def test_flags_of_the_study(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more, text = STUDY[case]
    assert text in refused(capsys, "study", "--preset", "demo", "--out", tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def put(data: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(data)


LINE = b'{"prediction": "x", "reference": "x"}\n'
ANSWERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (lambda file: None, "no such file"),
    "a folder": (lambda file: file.mkdir(), "is a directory"),
    "a pipe": (lambda file: os.mkfifo(file), "is not a plain file"),
    "empty": (put(b""), "holds no answers"),
    "cut": (put(LINE + LINE[:-9]), "line 2: not valid JSON: line"),
    "no reference": (put(LINE + b'{"prediction": "x"}'), "line 2: field 'reference' is missing"),
    "no prediction": (put(b'{"reference": "x"}'), "line 1: field 'prediction' is missing"),
    "a number": (put(b'{"prediction": 1, "reference": "x"}'), "line 1: field 'prediction' must be text"),
    "no reference in the list": (put(b'{"prediction": "x", "reference": []}'), "line 1: field 'reference' must be"),
    "a list": (put(b"[1]\n"), "line 1: must be an object, is a list"),
    "not UTF-8": (put(b"\xff"), "not UTF-8 at byte 0"),
    "key twice": (put(b'{"prediction": "x", "prediction": "y", "reference": "x"}'), "key 'prediction' given twice"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_answers(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """D30 and its like: what is given to `score`."""
    spoil, text = ANSWERS[case]
    spoil(tmp_path / "answers.jsonl")
    said = refused(capsys, "score", tmp_path / "answers.jsonl")
    assert said.startswith(str(tmp_path / "answers.jsonl"))
    assert text in said


def test_there_are_enough(bad_inputs: Any) -> None:
    tables = (bad_inputs.CHECKPOINTS, PAIRS, TOKENIZERS, ADAPTERS, FLAGS, ANSWERING, ANSWERS)
    assert sum(map(len, tables)) >= 120
    assert np.unique([len(table) for table in tables]).min() > 5


def test_debug_shows_where(sound: Path) -> None:
    with pytest.raises(ValueError, match="is not known"):
        cli.main([str(part) for part in train(sound, method="foo")] + ["--debug"])
