"""Invariants of the source tree: places and names of files, and forbidden constructs."""

import ast
import json
import re
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch

from minipeft import cli
from minipeft.adapters import METHODS, merge_adapter, remove_adapter
from minipeft.adapters.peft_format import load_adapter
from minipeft.errors import InputError
from minipeft.metrics import scores
from minipeft.metrics.scores import Score
from minipeft.models import FAMILIES
from minipeft.models.checkpoint import load_model, save_model
from minipeft.runs import estimates
from tests.small import LLAMA, write_pairs, write_tokenizer
from tests.toys import toy_family, toy_method
from tests.toys.toy_family import Toy, ToyConfig

ROOT = Path(__file__).resolve().parents[1]
LINEAR, TRITON = "tests/kernels/test_lora_linear.py", "tests/kernels/test_triton_backends.py"
ELSEWHERE = {  # kernel files whose tests stand in a file of another name: the parts of a kernel are tested through it
    **dict.fromkeys(("choice", "dropout", "reference", "rows"), LINEAR),
    **dict.fromkeys(("compile_check", "decode", "fused", "hybrid", "launch", "tiles"), TRITON),
    **dict.fromkeys(("triton_blocks", "triton_decode", "triton_kernels", "vector_add"), TRITON),
}
FAMILY_FILES = (
    "qwen",
    "smollm3",
    "granite",
    "olmo",
    "gemma",
    "starcoder2",
    "phi3",
    "gpt_neox",
    "phi",
    "layered",
    "rotary",
)
CLI = ("chat", "data", "flags", "generate", "inspect", "plan", "score", "streams", "study", "train")
MEASURES = ("__init__", "adapters", "answers", "machine", "rows", "scores", "training", "virtual")
EXERCISES = "tests/tour/test_exercises.py"
TOGETHER = {  # what has no meaning by itself is tested where it is used: the report as a page, signals by whole runs
    **dict.fromkeys([f"models/{name}" for name in FAMILY_FILES], "tests/models/test_families.py"),
    **dict.fromkeys(
        ("adapters/peft_ia3", "adapters/peft_ln_tuning", "adapters/peft_targets", "adapters/peft_vera"),
        "tests/adapters/test_peft_format.py",
    ),
    "__init__": "tests/test_imports.py",
    "models/quantized": "tests/models/test_quantize.py",
    "data/messages": "tests/data/test_forms.py",
    "data/preview": "tests/test_notebook.py",
    "tour/page": "tests/tour/test_book.py",
    "runs/preparation": "tests/runs/test_finetune.py",
    "data/sandbox": "tests/data/test_chat.py",
    "data/rows": "tests/data/test_packing.py",
    "data/streaming": "tests/data/test_token_file.py",
    "data/tokenizer_files": "tests/data/test_tokens.py",
    "adapters/full": "tests/adapters/test_adapters.py",
    "adapters/lora_variants": "tests/adapters/test_lora.py",
    "adapters/embedding": "tests/adapters/test_saved_modules.py",
    **dict.fromkeys(
        ("study/browser", "study/charts", "study/curves", "study/report", "study/results"), "tests/study/test_page.py"
    ),
    **dict.fromkeys([f"cli/{name}" for name in CLI], "tests/cli/test_cli.py"),
    "runs/folder": "tests/runs/test_checkpoints.py",
    "runs/process": "tests/test_survival.py",
    "metrics/sandbox": "tests/metrics/test_execution.py",
    "study/scoring": "tests/cli/test_cli.py",
    "study/executed": "tests/study/test_runner.py",
    **dict.fromkeys(("study/drafts", "study/trials"), "tests/study/test_presets.py"),
    **dict.fromkeys(("study/plans", "runs/gpus"), "tests/study/test_paper.py"),
    "study/rates_report": "tests/study/test_rates_experiment.py",
    "study/cells": "tests/study/test_runner.py",
    "cli/exercise": EXERCISES,
    "study/adapter_page": "tests/adapters/test_microscope.py",
    **dict.fromkeys(("cli/compare", "runs/peer"), "tests/runs/test_comparison.py"),
    **dict.fromkeys(
        ("cli/tour", "tour/bench", "tour/drawings", *(f"tour/measures/{name}" for name in MEASURES)),
        "tests/tour/test_book.py",
    ),
}


@cache
def sources() -> dict[str, ast.Module]:
    """Every source file by its path, parsed."""
    found = {}
    for folder in ("minipeft", "kernels"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            found[file.relative_to(ROOT).as_posix()] = ast.parse(file.read_text(encoding="utf-8"))
    return found


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """Each call in a file with the source of its callee."""
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def holds_code(tree: ast.Module) -> bool:
    return any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in ast.walk(tree))


def test_every_source_file_has_a_test_file_of_its_path():
    missing = []
    for name, tree in sources().items():
        path = Path(name)
        if path.parts[0] == "kernels":
            place = ELSEWHERE.get(path.stem, f"tests/kernels/test_{path.name}")
        else:
            stem = path.parent.name if path.stem == "__init__" else path.stem  # a package: test_PACKAGE.py inside it
            place = Path("tests", *path.parts[1:-1], f"test_{stem}.py").as_posix()
            inner = Path(*path.parts[1:]).with_suffix("").as_posix()
            place = TOGETHER.get(inner, EXERCISES if inner.startswith("tour/exercises/") else place)
        if holds_code(tree) and not (ROOT / place).exists():
            missing.append(f"{name} -> {place}")
    assert not missing, "\n".join(missing)


def test_kernels_is_no_package():
    """A package `kernels` that can be imported breaks transformers, which looks for one of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_no_file_is_called_after_nothing():
    assert not [
        name for name in sources() if Path(name).stem in ("utils", "util", "common", "helpers", "helper", "misc")
    ]


@pytest.mark.parametrize("kind", ["minipeft", "kernels"])
def test_every_file_says_what_it_holds(kind):
    assert not [name for name, tree in sources().items() if name.startswith(kind) and not ast.get_docstring(tree)]


def test_no_exception_is_swallowed():
    """`except Exception`, `except BaseException` and a bare `except` only if the exception is raised again."""
    for name, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                caught = {ast.unparse(part) for part in ast.walk(node.type)} if node.type else {"Exception"}
                if caught & {"Exception", "BaseException"}:
                    raised = [part for part in ast.walk(node) if isinstance(part, ast.Raise)]
                    assert raised, f"{name}:{node.lineno}"


def test_no_pickle_but_the_one_door():
    """torch.load is called once, in models/checkpoint.py, with weights_only=True; pickle only for an exception."""
    doors = []
    for name, tree in sources().items():
        for called, node in calls(tree):
            if called.endswith(("torch.load", "torch.save", "torch.hub.load", "read_pickle")):
                doors.append((name, called, {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only")))
            assert not any(k.arg == "allow_pickle" for k in node.keywords), name
        for node in ast.walk(tree):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert not set(modules) & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}, name
            if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "marshal", "shelve", "dill"):
                assert (name, [a.name for a in node.names]) == ("minipeft/models/checkpoint.py", ["UnpicklingError"])
    assert doors == [("minipeft/models/checkpoint.py", "torch.load", "True")]


def test_nothing_runs_text_as_code():
    for name, tree in sources().items():
        for called, node in calls(tree):
            where = f"{name}:{node.lineno}: {called}"
            assert called not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), where
            assert not called.startswith("builtins.") or called.split(".")[1] not in ("eval", "exec"), where
            assert not any(k.arg == "shell" and ast.unparse(k.value) != "False" for k in node.keywords), where


def test_every_package_is_declared():
    """setuptools' list in pyproject.toml names each folder that holds modules: an installed copy lacks none."""
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {Path(name).parent.as_posix().removeprefix("kernels/").replace("/", ".") for name in sources()}
    assert found - {"kernels"} == declared


def test_nothing_is_used_by_tests_alone():
    """Each function, class and method is used in the sources, a benchmark or an example.

    The house library of the demo is data: its functions are read, not called. sentence_bleu is for callers, and
    _render_traceback_ for IPython. The checks of an exercise are found by their prefix.
    """
    for_callers = {"sentence_bleu", "_render_traceback_"}
    texts = [file.read_text(encoding="utf-8") for root in ("minipeft", "kernels", "benchmarks", "examples")
             for file in (ROOT / root).rglob("*.py")]  # fmt: skip
    named = Counter(word for text in texts for word in re.findall(r"\w+", text))
    for name, tree in sources().items():
        if name != "minipeft/demo/house.py":
            for node in ast.walk(tree):
                prefixes = ("__", "check_") if name.startswith("minipeft/tour/exercises/tasks/") else ("__",)
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith(prefixes):
                    assert named[node.name] > 1 or node.name in for_callers, f"{name}:{node.lineno}: {node.name}"


# ---- A method, a family, a score and an option are each one file and one record (DESIGN, "Places to touch").


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toys of tests/toys, registered by their records alone."""
    monkeypatch.setitem(METHODS, "toy", toy_method.METHOD)
    monkeypatch.setitem(FAMILIES, "toy", toy_family.FAMILY)
    letters = Score("letters", "letters", "mean length of an answer", lambda a: sum(map(len, a.predictions)) / 3)
    monkeypatch.setattr(scores, "SCORES", [*scores.SCORES, letters])
    monkeypatch.setattr(estimates, "probe_flops", lambda *_: 1e9)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """A command's standard output; it must succeed."""
    status = cli.main([str(word) for word in words])
    said = capsys.readouterr()
    assert status == 0, said.err
    return said.out


def test_a_method_a_family_and_an_option_come_from_one_file_each(toys, tmp_path, capsys):
    """Trained, saved, inspected, planned, answered with and merged from the command line, which knows neither toy."""
    torch.set_num_threads(1)
    model = Toy(ToyConfig(**LLAMA))
    model.initialize(torch.Generator().manual_seed(0))
    save_model(model.eval(), tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    pairs, out = write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "run"
    given = ["--model", tmp_path / "base", "--data", pairs, "--method", "toy", "--shift-init", "0.25", "--steps", "2"]
    run(capsys, "train", *given, "--length", "64", "--held-out", "2", "--out", out)
    assert json.loads((out / "run.json").read_text())["arguments"]["shift_init"] == 0.25
    assert json.loads((out / "result.json").read_text())["learning_rate"] == 1e-2  # the record's recipe
    assert "toy" in run(capsys, "inspect", out / "adapter")
    assert "toy" in run(capsys, "plan", tmp_path / "base", "--method", "toy", "--length", "64")
    answer = ["generate", "--model", tmp_path / "base", "--adapter", out / "adapter", "--max-new-tokens", "4", "add 1"]
    run(capsys, *answer)
    tuned = load_model(tmp_path / "base")
    assert load_adapter(tuned, out / "adapter").method == "toy"
    with pytest.raises(InputError, match="the base has none there"):  # this toy's vector needs a bias to go into
        merge_adapter(tuned)
    remove_adapter(tuned)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(tuned(ids), model(ids))
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    said = capsys.readouterr().out
    assert "--shift-init" in said
    assert "initial shift, the toy's own option" in said


def test_a_score_is_its_function_and_one_row(toys, tmp_path, capsys):
    answers = tmp_path / "answers.jsonl"
    rows = [{"prediction": "x = 1", "reference": "x = 1"}, {"prediction": "y", "reference": "y"}, {"prediction": "",
            "reference": "z"}]  # fmt: skip
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert json.loads(run(capsys, "score", answers, "--json"))["letters"] == 2.0
    assert "letters" in run(capsys, "score", answers)


def test_no_ladder_asks_for_the_class_of_a_config():
    """`isinstance(config, LoRAConfig)`: differences between methods belong in their records."""
    configs = {method.config.__name__ for method in METHODS.values()}
    for name, tree in sources().items():
        for called, node in calls(tree):
            if called == "isinstance" and len(node.args) == 2:
                assert not {ast.unparse(part) for part in ast.walk(node.args[1])} & configs, f"{name}:{node.lineno}"


def test_no_namespace_below_the_command_line():
    """Only cli/ uses argparse's Namespace; other packages take configs and arguments."""
    for name, tree in sources().items():
        if name.startswith("minipeft/") and not name.startswith(("minipeft/cli/", "minipeft/demo/")):
            assert "argparse" not in ast.unparse(tree), name
