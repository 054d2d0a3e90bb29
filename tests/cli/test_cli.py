"""The commands as a user sees them: help with an example, one line for an error, JSON for programs, resuming."""

import ast
import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minipeft import cli
from minipeft.adapters import METHODS
from minipeft.generation import Answer
from minipeft.models import GPT2, GPT2Config
from minipeft.models.checkpoint import save_model
from minipeft.runs import answers as answering
from minipeft.runs import estimates
from minipeft.runs.config import collect_settings
from tests.small import GPT2 as SIZES
from tests.small import write_pairs, write_small_model, write_tokenizer

Ran = tuple[int, str, str]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "probe_flops", lambda *_: 1e9)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, pairs, and a run that trained it for two steps."""
    folder = tmp_path_factory.mktemp("cli")
    write_small_model(folder / "model", layers=1)
    write_pairs(folder / "pairs.jsonl", 8)
    return folder


def train(folder: Path, *more: object, out: str = "out") -> list[object]:
    given = {"model": folder / "model", "data": folder / "pairs.jsonl", "out": folder / out, "steps": 2, "length": 64}
    given |= {"held-out": 2} | ({} if {"full", "ia3"} & {*more} else {"rank": 2})
    return ["train", *(part for name, value in given.items() for part in (f"--{name}", value)), *more]


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimates, "probe_flops", lambda *_: 1e9)
        assert cli.main([str(part) for part in train(folder, out="tuned")]) == 0
    return folder / "tuned/adapter"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_has_an_example_that_parses(name: str, run: Callable[..., Ran]) -> None:
    status, out, _ = run(name, "--help")
    assert status == 0
    example = out.split("example:")[1].strip().splitlines()[0]
    assert example.startswith(f"minipeft {name} ")
    assert cli.make_parser().parse_args(shlex.split(example)[1:]).run
    for line in out.splitlines():
        assert not line.strip().endswith("(default None)"), line


def test_every_flag_of_train_is_explained(run: Callable[..., Ran]) -> None:
    """And every setting of every method has a flag."""
    said = run("train", "--help")[1]
    for method in METHODS:
        for flag, setting in collect_settings(method).items():
            assert f"--{flag} " in said or f"--{flag}," in said, flag
            assert setting.metadata["help"], flag


def test_flags_that_no_config_declares() -> None:
    """Positionals, the output format, --debug, and the method, which decides whose fields are read."""
    found = {}
    for file in sorted(Path(cli.__file__).parent.glob("*.py")):
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        calls = [call for call in calls if ast.unparse(call.func).endswith(".add_argument")]
        names = [call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)]
        if names:
            found[file.stem] = names
    assert found == {
        "__init__": ["--debug"],
        "compare": ["first", "second", "--json"],
        "data": ["source", "--json"],
        "exercise": ["number", "--check", "--hint", "--solution", "--overwrite", "--json", "--out"],
        "generate": ["prompts"],
        "inspect": ["folder", "other", "--json"],
        "merge": ["--json"],
        "plan": ["models", "--json"],
        "push": ["folder", "hub_id"],
        "score": ["file", "--json"],
        "study": ["--plan", "--json"],
        "train": ["--method", "--json"],
    }


def test_train_says_what_it_did(folder: Path, run: Callable[..., Ran]) -> None:
    status, out, err = run(*train(folder))
    assert status == 0
    assert out.startswith(f"{folder}/out/adapter: 2 steps, loss ")
    assert len(out.splitlines()) == 1
    assert "trainable  " in err
    assert sorted(p.name for p in (folder / "out").iterdir()) == [
        ".lock",
        "adapter",
        "checkpoints",
        "log.jsonl",
        "result.json",
        "run.json",
        "timing.json",
    ]
    again = run(*train(folder))
    assert again[0] == 2
    assert again[2].count("\n") == 1
    assert again[2].startswith(f"error: {folder}/out: is not empty (")
    status, out, err = run(*train(folder, "--resume", "--json"))
    assert (status, json.loads(out)["steps"]) == (0, 2)
    assert "0 steps left" in err


def test_full_tuning_leaves_a_model_that_answers(folder: Path, run: Callable[..., Ran]) -> None:
    status, out, _ = run(*train(folder, "--method", "full", out="full"))
    assert (status, out.split(":")[0]) == (0, f"{folder}/full/model")
    assert run("generate", "--model", folder / "full/model", "--max-new-tokens", 3, "add 1")[0] == 0


def test_generate_answers_prompts(folder: Path, adapter: Path, run: Callable[..., Ran]) -> None:
    given = ["generate", "--model", folder / "model", "--max-new-tokens", 4, "--temperature", 0]
    status, plain, _ = run(*given, "add 1", "--raw")
    assert status == 0
    status, tuned, _ = run(*given, "--adapter", adapter, "add 1", "--raw")
    merged = run(*given, "--adapter", adapter, "--merge", "add 1", "--raw")
    assert (status, tuned) == merged[:2]
    assert plain


def test_a_data_set_is_answered_and_scored(
    folder: Path, adapter: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    out = tmp_path / "answers.jsonl"
    given = [
        "generate",
        "--model",
        folder / "model",
        "--adapter",
        adapter,
        "--max-new-tokens",
        4,
        "--data",
        folder / "pairs.jsonl",
        "--out",
        out,
        "--batch",
        3,
    ]
    assert run(*given)[0] == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["reference"] for row in rows] == [f"x += {n}" for n in range(8)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answers.jsonl"]
    assert "exists already" in run(*given)[2]
    status, said, _ = run("score", out, "--json")
    assert status == 0
    assert json.loads(said)["pairs"] == 8
    assert "CodeBLEU" in run("score", out)[1]


def test_answering_goes_on_where_it_was_stopped(
    folder: Path, tmp_path: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def given(out: Path, *more: object) -> list[object]:
        return [
            "generate",
            "--model",
            folder / "model",
            "--max-new-tokens",
            4,
            "--data",
            folder / "pairs.jsonl",
            "--out",
            out,
            "--batch",
            2,
            *more,
        ]

    assert run(*given(tmp_path / "whole.jsonl"))[0] == 0
    plain, made = answering.answer, []

    def interrupted(*arguments: Any, **named: Any) -> Any:
        for answer in plain(*arguments, **named):
            if len(made) == 5:
                raise KeyboardInterrupt
            made.append(answer)
            yield answer

    monkeypatch.setattr(answering, "answer", interrupted)
    out = tmp_path / "part.jsonl"
    assert run(*given(out))[0] == 130
    monkeypatch.undo()
    assert not out.exists()
    part = tmp_path / "part.jsonl.part"
    part.write_bytes(part.read_bytes() + b'{"index": 6, "predic')  # a line that was cut
    status, _, err = run(*given(out, "--seed", "3"))
    assert status == 2
    assert f"{part}: was started with other settings" in err
    seen: list[Answer] = []
    monkeypatch.setattr(answering, "answer", lambda *a, **n: (seen.append(x) or x for x in plain(*a, **n)))
    assert run(*given(out))[0] == 0
    assert len(seen) == 3, "what had been answered is not answered again"
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not part.exists()


def test_an_error_leaves_nothing_half_written(folder: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    status, out, err = run(*train(folder, "--model", tmp_path / "model", "--out", tmp_path / "out"))
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {weights}: data incomplete")
    assert not (tmp_path / "out/adapter").exists()
    assert not list(tmp_path.glob("out/.probe*"))


def test_nobody_reads_the_output(folder: Path, tmp_path: Path) -> None:
    """`minipeft train ... 2>&1 | true`: the run goes to its end all the same, with status 0."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "minipeft", *map(str, train(folder, "--out", tmp_path / "out"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, stdout=writer, stderr=writer, env=environment)
    os.close(writer)
    assert ran.returncode == 0
    assert (tmp_path / "out/result.json").exists()


@pytest.mark.parametrize("errors", ["2>&-", "2>/dev/full"])
def test_standard_error_may_be_closed_or_full(errors: str, folder: Path, tmp_path: Path) -> None:
    """Only the messages are lost: the run ends with status 0."""
    words = [sys.executable, "-m", "minipeft", *map(str, train(folder, "--out", tmp_path / "out"))]
    ran = subprocess.run(
        f"{shlex.join(words)} {errors}",
        shell=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )
    assert ran.returncode == 0
    assert ran.stdout.startswith(f"{tmp_path}/out/adapter: 2 steps, loss ")
    assert (tmp_path / "out/result.json").exists()
    wanted = train_log(folder, tmp_path)
    assert (tmp_path / "out/log.jsonl").read_text() == wanted, "nothing was printed into a file of the run"


def train_log(folder: Path, tmp_path: Path) -> str:
    """The log of the same run with a standard error that works."""
    assert cli.main([str(part) for part in train(folder, "--out", tmp_path / "plain")]) == 0
    return (tmp_path / "plain/log.jsonl").read_text()


def test_an_error_is_reported_by_its_status_alone_where_nobody_listens(folder: Path) -> None:
    words = [sys.executable, "-m", "minipeft", "score", "no-such-file"]
    for errors in ("2>&-", "2>/dev/full"):
        assert subprocess.run(f"{shlex.join(words)} {errors}", shell=True).returncode == 2


def test_the_rate_has_a_short_name_and_multipliers(folder: Path, tmp_path: Path, run: Callable[..., Ran]) -> None:
    more = ("--lr", "0.25", "--lr-multiplier", "lora_B=16", "--targets", "c_attn,mlp.c_proj", "--dora", "--out")
    assert run(*train(folder, *more, tmp_path / "out"))[0] == 0
    held = json.loads((tmp_path / "out/run.json").read_text())["arguments"]
    assert (held["learning_rate"], held["lr_multiplier"]) == (0.25, {"lora_B": 16.0})
    assert (held["targets"], held["dora"]) == (["c_attn", "mlp.c_proj"], True)
    status, _, err = run(*train(folder, "--lr-multiplier", "lora_B"))
    assert (status, "'lora_B' must be NAME=VALUE" in err) == (2, True)


@pytest.mark.parametrize("method", ["ia3", "dora", "rslora", "pissa"])
def test_every_method_trains_from_the_command_line(
    method: str, folder: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    status, _, err = run(*train(folder, "--method", method, "--out", tmp_path / "out"))
    assert (status, err.count("error")) == (0, 0)
    assert (tmp_path / "out/adapter/adapter_config.json").exists()


def test_what_an_adapter_notes_is_said(
    folder: Path, adapter: Path, tmp_path: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that was trained on another model."""
    shutil.copytree(adapter, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "some/other-model"}))
    given = ["generate", "--model", folder / "model", "--max-new-tokens", 2, "--adapter", tmp_path / "adapter", "x"]
    status, _, err = run(*given)
    assert status == 0
    assert "note: " in err
    assert "some/other-model" in err


def test_escape_sequences_of_a_file_are_not_printed(tmp_path: Path, adapter: Path, run: Callable[..., Ran]) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "\x1b[2Jmodel"}))
    status, out, err = run("inspect", tmp_path / "adapter")
    assert status == 0
    assert "\x1b" not in out + err
    assert "\\x1b[2Jmodel" in out
    status, out, err = run("score", tmp_path / "a\x1b[31mb")
    assert (status, "\x1b" in err) == (2, False)


def test_the_locale_does_not_matter(folder: Path, adapter: Path, tmp_path: Path) -> None:
    """With LANG=C a text that is not ASCII is read and written as UTF-8."""
    row = {"intent": "größe → 1", "snippet": "größe = '→'", "question_id": 1}
    (tmp_path / "p.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "minipeft",
        "generate",
        "--model",
        str(folder / "model"),
        "--max-new-tokens",
        "2",
        "--data",
        str(tmp_path / "p.jsonl"),
        "--out",
        str(tmp_path / "a.jsonl"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0"}
    ran = subprocess.run(command, capture_output=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8"))["reference"] == row["snippet"]


OUT_OF_MEMORY = """
import resource, sys
from pathlib import Path
from minipeft import cli

def limited(*arguments, **named):
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 2**20, held + 2**20))
    return load(*arguments, **named)

from minipeft.runs import preparation
load, preparation.load_model = preparation.load_model, limited
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS binds on Linux alone")
def test_out_of_memory_is_a_line_too(tmp_path: Path) -> None:
    """A process limited to 1 MiB more loads a position table of 16 MB."""
    save_model(GPT2(GPT2Config(**SIZES | {"n_positions": 2**18})), tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    command = [sys.executable, "-c", OUT_OF_MEMORY, "generate", "--model", str(tmp_path / "model"), "x"]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.splitlines()[-1].startswith("error: out of memory")


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory", "/x/sympy")])
def test_out_of_memory_while_the_flags_are_built_is_a_line_too(
    error: BaseException, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--help` and the flags import most of the package: memory may run out there."""

    def fail(parser: object) -> None:
        raise error

    monkeypatch.setattr(cli.score, "add_flags", fail)
    status, _, err = run("score", "x.jsonl")
    assert (status, err) == (
        2,
        "error: out of memory. What was written is whole: free memory and give the command again\n",
    )


def write_answers(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_two_files_of_answers_are_compared(tmp_path: Path, run: Callable[..., Ran]) -> None:
    rows = [{"prediction": f"f({n})", "reference": f"f({n})", "question_id": n} for n in range(20)]
    one = write_answers(tmp_path / "a.jsonl", rows)
    other = write_answers(tmp_path / "b.jsonl", [row | {"prediction": "f(x)"} if n < 5 else row for n, row in
                                                 enumerate(rows)][::-1])  # fmt: skip
    status, said, _ = run("score", one, "--against", other)
    assert status == 0
    assert f"{one} minus {other}, paired over 20 questions" in said
    assert "exact match    +25.0 % [+10.0, +45.0], p = " in said
    found = json.loads(run("score", one, "--against", other, "--json")[1])
    assert found["exact_match"] == 1.0
    assert found["against"]["exact_match"]["value"] == 0.25
    status, _, err = run("score", one, "--against", write_answers(tmp_path / "c.jsonl", rows[:-1]))
    assert status == 2
    assert "c.jsonl: has no answer to answer 20 of the other file" in err


def test_answers_are_run_only_where_it_is_asked_for(tmp_path: Path, run: Callable[..., Ran]) -> None:
    tasks = write_answers(
        tmp_path / "tasks.jsonl", [{"task_id": n, "test_list": [f"assert f(2) == {2 * n}"]} for n in (1, 2)]
    )
    loop, right = "def f(x):\n    while True: pass", "def f(x):\n    return x * 2"
    texts = [(1, loop), (2, right), (1, "def f(x): return 2"), (2, "def f(x): return x")]
    rows = [{"task_id": n, "prediction": text, "reference": right} for n, text in texts]
    answers = write_answers(tmp_path / "answers.jsonl", rows)
    assert json.loads(run("score", answers, "--json")[1])["pass_at_1"] is None
    given = ["score", answers, "--execute", tasks, "--execute-seconds", "1"]
    status, said, err = run(*given)
    if "cannot isolate programs" in err:
        pytest.skip(err)
    assert status == 0
    assert "execution      pass@1 50.0 %" in said
    unknown = write_answers(tmp_path / "unknown.jsonl", [rows[0] | {"task_id": "zz"}])
    status, _, err = run("score", unknown, "--execute", tasks)
    assert status == 2
    assert "tasks.jsonl: answer 1 has task_id or question_id 'zz', for which there is no task" in err
    said = " ".join(run("score", "--help")[1].split())
    assert "It can still read what you can read" in said
    assert "It can still read what you can read" in " ".join(run("study", "--help")[1].split())
