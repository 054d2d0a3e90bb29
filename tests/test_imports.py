"""The import rule, by AST, and what `import minipeft` costs, in fresh processes.

Models know no adapter. Adapters know no trainer. The trainer knows no adapter. Metrics know no tensor. Kernels know
nobody, and one place knows them. Imports inside functions count too.
"""

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import minipeft

ROOT = Path(__file__).resolve().parents[1]
KNOWS = {  # package: what of minipeft it may import
    "errors": set(),
    "documents": set(),
    "files": {"errors"},
    "tensor_files": {"errors", "files"},
    "hub": {"errors", "files"},
    "data": {"data", "documents", "errors", "files", "tensor_files", "hub"},
    "models": {"models", "documents", "errors", "files", "tensor_files", "hub"},
    "metrics": {"metrics", "errors", "files"},
    "adapters": {"adapters", "models", "documents", "errors", "files", "tensor_files", "hub"},
    "training": {"training", "models", "data", "documents", "errors", "files", "hub"},
    "sampling": {"documents"},
    "decoding": {"models", "sampling", "documents", "errors"},
    "generation": {"decoding", "models", "data", "sampling", "documents", "errors", "files"},
    "demo": {"demo", "errors", "files"},
}
KNOWS["runs"] = {"runs", "generation", "decoding", "sampling", "training"} | KNOWS["adapters"] | KNOWS["training"]
KNOWS["study"] = {"study", "metrics"} | KNOWS["runs"]
KNOWS["tour"] = {"tour", "study"} | KNOWS["study"]
KNOWS["cli"] = {"cli", "tour"} | KNOWS["study"]  # so nobody but itself imports cli, and only cli and tour the study
PEERS = {"transformers", "peft", "trl", "datasets", "codebleu", "accelerate", "bitsandbytes"}
LAZY = [
    "transformers",
    "peft",
    "triton",
    "safetensors.torch",
    "huggingface_hub",
    "sacrebleu",
    "matplotlib",
    "minipeft.cli",
]


@cache
def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    found = {}
    for root, package in ((ROOT, "minipeft"), (ROOT / "kernels", "minipeft_kernels")):
        for file in (root / package).rglob("*.py"):
            parts = file.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def imports(name: str) -> set[str]:
    """All imports of a module as dotted names; ours resolved to modules."""
    found = set()
    for node in ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            stem = node.module or ""
            if node.level:
                package = name if modules()[name].name == "__init__.py" else name.rpartition(".")[0]
                above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
                stem = f"{above}.{stem}".rstrip(".")
            for alias in node.names:
                inner = f"{stem}.{alias.name}"
                found.add(inner if inner in modules() else stem)
    return found


def ours(name: str) -> set[str]:
    return {other for other in imports(name) if other in modules()}


def test_the_table_of_modules_is_not_empty():
    assert {"minipeft", "minipeft.models.gpt2", "minipeft_kernels"} <= modules().keys()
    assert "minipeft.models.llama" in ours("minipeft.models.mistral")
    assert "minipeft.errors" in ours("minipeft.files")


@pytest.mark.parametrize("package", KNOWS)
def test_each_knows_only_what_it_may(package):
    for name in modules():
        if name.split(".")[1:2] == [package]:
            known = {other.split(".")[1] for other in ours(name) if "." in other and other.startswith("minipeft.")}
            assert known <= KNOWS[package], name
            assert "minipeft" not in ours(name), f"{name} imports the whole of minipeft"


def test_the_rule_is_for_every_room():
    rooms = {name.split(".")[1] for name in modules() if name.startswith("minipeft.")}
    assert rooms - {"__main__"} == set(KNOWS)
    above = ("cli", "study", "tour")
    assert not any(set(above) & knows for room, knows in KNOWS.items() if room not in above)
    assert "tour" not in KNOWS["study"]


def test_the_tour_draws_with_the_studys_plots_and_explorer_and_knows_nothing_else_of_it():
    for name in modules():
        if name.startswith("minipeft.tour"):
            known = {other.removeprefix("minipeft.study") for other in ours(name) if other.startswith("minipeft.study")}
            assert known <= {"", ".charts", ".curves", ".explorer"}, name


def test_metrics_know_no_tensor():
    for name in modules():
        if name.startswith("minipeft.metrics"):
            assert not {other for other in imports(name) if other.split(".")[0] in ("torch", "minipeft_kernels")}, name


def test_kernels_know_nobody_and_one_place_knows_them():
    knowing = {name for name in modules() if any(other.split(".")[0] == "minipeft_kernels" for other in imports(name))}
    inside = {name for name in modules() if name.startswith("minipeft_kernels")}
    assert len(knowing - inside) <= 1
    for name in inside:
        assert not {other for other in imports(name) if other.split(".")[0] == "minipeft"}, name


def test_peers_appear_under_tests_and_benchmarks_only():
    """And transformers in runs/peer.py, within the function that `minipeft compare --transformers` calls."""
    for name in modules():
        found = {other.split(".")[0] for other in imports(name)} & PEERS
        assert found == ({"transformers"} if name == "minipeft.runs.peer" else set()), name


def test_sacrebleu_appears_in_one_place():
    having = {name for name in modules() if any(other.split(".")[0] == "sacrebleu" for other in imports(name))}
    assert having <= {"minipeft.metrics.text"}


def test_there_are_no_cycles():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in ours(name) - {name}:
                visit(other, (*path, name))
            done.add(name)

    for name in modules():
        visit(name, ())


def test_no_module_bears_the_name_of_a_public_function():
    """`minipeft.generate` is a function: a module minipeft/generate.py would hide it, or be hidden.

    minipeft/metrics/bleu.py hides nothing: `minipeft.metrics` exports no function of that name.
    """
    beside = {name.split(".")[1] for name in modules() if name.startswith("minipeft.")}
    assert not beside & set(minipeft.__all__)


def test_each_public_name_is_there():
    assert sorted(set(minipeft.__all__)) == sorted(minipeft.__all__)
    assert all(hasattr(minipeft, name) for name in minipeft.__all__)


PROGRAM = f"""
import json, sys, threading, time
start = time.process_time()
import torch
torchs = time.process_time() - start
sys.dont_write_bytecode = True
state = lambda: (torch.get_num_threads(), str(torch.get_default_dtype()), threading.active_count(),
                 torch.random.get_rng_state().tolist())
before, written = state(), []
sys.addaudithook(lambda event, a: event == "open" and "w" in str(a[1]) and written.append(str(a[0])))
start = time.process_time()
import minipeft
seconds = time.process_time() - start
loaded = [name for name in {LAZY} if name in sys.modules]
print(json.dumps(dict(seconds=seconds, torchs=torchs, loaded=loaded, written=written, unchanged=before == state())))
"""


def fresh() -> dict:
    """The effects of `import minipeft` in a new process that has imported torch, in a folder outside the project."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=ROOT.parent, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def first() -> dict:
    return fresh()


def test_import_leaves_what_is_heavy_alone(first):
    assert first["loaded"] == []


def test_import_takes_torchs_own_time_plus_300_milliseconds(first):
    """Processor time; at most five tries. Where torch takes over 1.5 s the machine is slow: a fifth of that instead."""
    taken = [first]
    over = lambda: min(one["seconds"] - max(0.3, one["torchs"] / 5) for one in taken)
    while len(taken) < 5 and over() > 0:
        taken.append(fresh())
    assert over() <= 0, [(one["seconds"], one["torchs"]) for one in taken]


def test_import_defines_and_does_nothing_else(first):
    """No thread, no file, no random number, no change of torch's settings."""
    assert first["written"] == []
    assert first["unchanged"]


def test_each_public_name_is_there_though_its_module_comes_later():
    code = (
        "import minipeft, json\n"
        "assert set(minipeft.__all__) <= set(dir(minipeft))\n"
        "from minipeft import *\n"
        "print(json.dumps([name for name in minipeft.__all__ if name not in globals()]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
    with pytest.raises(AttributeError, match="module 'minipeft' has no attribute 'trian'"):
        minipeft.trian  # noqa: B018
