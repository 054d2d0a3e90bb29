"""What is true of the tree as a whole: where files stand, what they are called, and what no file may hold."""

import ast
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINEAR, PATHS = "tests/kernels/test_lora_linear.py", "tests/kernels/test_triton_paths.py"
ELSEWHERE = {  # kernel files whose tests stand in a file of another name: the parts of a kernel are tested through it
    **dict.fromkeys(("choice", "dropout", "onednn", "reference", "rows"), LINEAR),
    **dict.fromkeys(("compile_check", "decode", "device", "fused", "hybrid", "launch", "tiles"), PATHS),
}
TOGETHER = {  # what has no meaning by itself is tested where it is used: the report as a page, signals by whole runs
    **dict.fromkeys(("study/charts", "study/report", "study/results", "study/table"), "tests/study/test_page.py"),
    **dict.fromkeys(("cli/commands", "cli/flags"), "tests/cli/test_cli.py"),
    **dict.fromkeys(("runs/config", "runs/estimates"), "tests/runs/test_finetune.py"),
    "runs/process": "tests/test_survival.py",
    "study/cells": "tests/study/test_runner.py",
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
    """Each call in a file with what is called, as it is written."""
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
            place = TOGETHER.get(Path(*path.parts[1:]).with_suffix("").as_posix(), place)
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
    """`except Exception`, `except BaseException` and a bare `except` stand only where the exception goes on."""
    for name, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                caught = {ast.unparse(part) for part in ast.walk(node.type)} if node.type else {"Exception"}
                if caught & {"Exception", "BaseException"}:
                    raised = [part for part in ast.walk(node) if isinstance(part, ast.Raise)]
                    assert raised, f"{name}:{node.lineno}"


def test_no_pickle_but_the_one_door():
    """torch.load stands once, in models/checkpoint.py, with weights_only=True; of pickle only an exception's name."""
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
