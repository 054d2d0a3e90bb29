"""`minipeft merge`: a plain folder, the report before it is written, and the errors."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import minipeft
from minipeft import cli
from minipeft.adapters import PromptConfig, add_adapter
from minipeft.adapters.verdict import Comparison
from tests.small import write_adapter, write_pairs, write_small_model

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter away from its init, and pairs."""
    folder = tmp_path_factory.mktemp("tuned")
    write_adapter(write_small_model(folder / "model", "llama", layers=1), folder / "adapter")
    write_pairs(folder / "pairs.jsonl", 8)
    return folder


def merging(folder: Path, out: Path, *more: object) -> list[object]:
    return ["merge", "--model", folder / "model", "--adapter", folder / "adapter", "--out", out, *more]


def test_a_plain_folder_that_transformers_and_generate_open(folder: Path, tmp_path: Path, run: Run) -> None:
    given = ["--data", folder / "pairs.jsonl", "--limit", 3, "--new-tokens", 4]
    status, out, err = run(*merging(folder, tmp_path / "out", *given, "--json"))
    assert status == 0
    report = json.loads(out)
    assert (report["prompts"], report["changed_answers"]) == (3, 0)
    assert 0 <= report["mean_kl"] <= report["max_kl"] < 1e-9
    assert "KL         mean " in err
    model, tokenizer = minipeft.load_model(folder / "model"), minipeft.load_tokenizer(folder / "model")
    minipeft.load_adapter(model, folder / "adapter")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = theirs("add 1", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == tokenizer.encode("add 1")
    assert torch.allclose(peer(ids).logits, model(ids), atol=1e-5)
    answer = ["--raw", "add 1", "--temperature", 0, "--max-new-tokens", 5]
    plain = run("generate", "--model", tmp_path / "out", *answer)[1]
    assert plain == run("generate", "--model", folder / "model", "--adapter", folder / "adapter", *answer)[1]
    assert "| KL | mean " in (tmp_path / "out/README.md").read_text()


def test_a_cast_is_compared_before_anything_is_written(
    folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("add 1\n\nadd 22\n")
    written: list[bool] = []
    say = cli.merge.say
    monkeypatch.setattr(cli.merge, "say", lambda text: (written.append((tmp_path / "out").exists()), say(text)))
    given = ["--prompts", tmp_path / "prompts.txt", "--raw", "--dtype", "bf16"]
    status, out, err = run(*merging(folder, tmp_path / "out", *given))
    assert (status, out) == (0, f"{tmp_path / 'out'}\n")
    assert written == [False]  # said before anything is written
    assert "of 2 prompts and their answers" in err
    assert float(re.findall(r"^KL +mean (.*), max", err, re.MULTILINE)[0]) > 1e-8  # in float32: 1e-14
    assert minipeft.load_model(tmp_path / "out").embedding.weight.dtype == torch.bfloat16


def test_a_change_of_more_than_a_thousandth_of_the_tokens_is_warned_of(
    folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Comparison.measure
    monkeypatch.setattr(Comparison, "measure", lambda *given: measure(*given) | {"tokens": 999, "changed_tokens": 1})
    _, _, err = run(*merging(folder, tmp_path / "out", "--data", folder / "pairs.jsonl", "--new-tokens", 4))
    assert "\nwarning    merging changes 0.1 % of the top-1 tokens (1 of 999)\n" in err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "merge: give --prompts FILE or --data DATA"),
        (["--data", "demo", "--raw"], "raw: has no effect with --data"),
        (["--prompts", "absent.txt"], "absent.txt: no such file"),
        (["--prompts", "/dev/null"], "/dev/null: is not a plain file"),
        (["--data", "demo", "--limit", "0"], "limit: 0 must be an integer >= 1"),
        (["--data", "demo", "--adapter", "absent"], "absent/adapter_config.json: no such file"),
        (["--data", "demo", "--new-tokens", "96"], "prompt 1: "),
        (["--data", "demo", "--dtype", "fp16"], "dtype: 'fp16' is not known (fp32, bf16)"),
    ],
)
def test_what_is_refused_writes_nothing(folder: Path, tmp_path: Path, run: Run, more: list[str], said: str) -> None:
    status, _, err = run(*merging(folder, tmp_path / "out", *more))
    assert status == 2
    assert said in err
    assert err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(folder: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "kept").write_text("x")
    status, _, err = run(*merging(folder, tmp_path, "--data", "demo"))
    assert (status, err) == (2, f"error: {tmp_path}: exists already. Name another --out, or remove it\n")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_prompt_adapter_is_refused(folder: Path, tmp_path: Path, run: Run) -> None:
    model, tokenizer = minipeft.load_model(folder / "model"), minipeft.load_tokenizer(folder / "model")
    add_adapter(model, PromptConfig(length=2), tokenizer)
    minipeft.save_adapter(model, tmp_path / "prompt")
    words = ["--model", folder / "model", "--adapter", tmp_path / "prompt", "--data", "demo"]
    status, _, err = run("merge", *words, "--out", tmp_path / "out")
    assert status == 2
    assert "merge_adapter: the model holds prompt; only LoRA and (IA)3 and VeRA and LN-tuning merge into weights" in err
    assert not (tmp_path / "out").exists()
