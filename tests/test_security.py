"""No loaded file can run code or open another file: checked in the source (AST) and at run time (audit hook)."""

import ast
import json
import os
import pickle
import re
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from minipeft import files, tensor_files
from minipeft.adapters import LoRAConfig, add_adapter, patterns
from minipeft.adapters.peft_format import load_adapter, save_adapter
from minipeft.data import reading
from minipeft.data.examples import load_pairs
from minipeft.data.tokens import load_tokenizer
from minipeft.errors import InputError
from minipeft.metrics import dataflow, text
from minipeft.models.checkpoint import load_model
from minipeft.runs import checkpoints as runs
from minipeft.runs import planning
from minipeft.runs.answers import read_answers
from tests.small import write_pairs, write_small_model

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "minipeft").rglob("*.py"), *(ROOT / "kernels/minipeft_kernels").rglob("*.py")])
# What could run code out of a file: names that must not be called, and modules that must not be imported.
BUILTIN = {"eval", "exec", "compile", "__import__"}
CALLS = {"eval", "exec", "compile", "__import__", "import_module", "system", "popen", "run_path", "run_module",
         "load_module", "exec_module", "unsafe_load", "trust_remote_code"}  # fmt: skip
MODULES = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "marshal", "shelve", "yaml", "jinja2", "code",
           "codeop", "runpy", "imp", "ctypes", "cffi", "multiprocessing"}  # fmt: skip
# Each exception with its reason; what stands here and is not found is an error too.
ALLOWED = {
    ("minipeft/models/checkpoint.py", "import pickle"): "the name UnpicklingError, to catch it",
    ("minipeft/models/checkpoint.py", "torch.load"): "legacy_bin=True, with weights_only=True",
    ("minipeft/adapters/patterns.py", "subprocess"): "tries a regular expression in a process that can be killed",
    ("minipeft/study/runner.py", "subprocess"): "a cell of a study in a process of its own: this package's module",
    ("minipeft/metrics/execution.py", "subprocess"): "the sandbox of programs, where --execute asks for it alone",
    ("minipeft/models/checkpoint.py", "import ctypes"): "malloc_trim of the process's own C library",
    ("minipeft/metrics/sandbox.py", "import ctypes"): "unshare, mount and prctl, which os lacks before Python 3.12",
    ("minipeft/__init__.py", "import_module"): "public names of this package, imported at first use",
    ("minipeft/data/chat.py", "import jinja2"): "names of its errors, to catch them",
    ("minipeft/data/sandbox.py", "import jinja2"): "chat templates, in its immutable sandbox",
    ("minipeft/data/sandbox.py", "import jinja2.ext"): "the same: {% generation %}, break and continue",
    ("minipeft/data/sandbox.py", "import jinja2.sandbox"): "the same",
    ("minipeft/demo/corpus.py", "import_module"): "modules that it names itself, for their documentation",
    ("minipeft/tour/book.py", "import_module"): "markdown_it, where it is installed",
    ("minipeft/tour/notebooks.py", "import_module"): "nbformat, where it is installed",
    ("minipeft/tour/measures/machine.py", "subprocess"): "a module of this package, with Triton's interpreter",
    ("minipeft/tour/exercises/checking.py", "subprocess"): "runs the student's answer, by `exercise --check` alone",
    (
        "minipeft/tour/exercises/checking.py",
        "exec_module",
    ): "the same: exercise_N.py and its checks, which the command wrote",
    ("minipeft/tour/exercises/bugs.py", "import_module"): "the module of this package that the patch names",
    (
        "minipeft/tour/exercises/tasks/lora_backward.py",
        "import_module",
    ): "a module of this project that it names itself",
    ("kernels/minipeft_kernels/choice.py", "import_module"): "one of the kernel paths that the module itself names",
}


def name_of(node: ast.expr) -> str:
    """a.b.c of such an expression."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def dangers(source: str) -> Iterator[tuple[str, ast.AST]]:
    """Constructs that could run code from a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((f"import {n}", node) for n in names if n.split(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            name = name_of(node.func)
            last = name.rsplit(".", 1)[-1]
            if last in CALLS - BUILTIN or name.removeprefix("builtins.") in BUILTIN:
                yield last, node  # model.eval() and re.compile() are other things
            if name.startswith("subprocess."):
                yield "subprocess", node
            if name in ("torch.load", "torch.jit.load", "torch.hub.load", "numpy.load", "np.load"):
                yield name, node
            yield from ((k.arg or "", node) for k in node.keywords if k.arg in ("shell", "allow_pickle", *CALLS))


def test_the_source_has_no_way_to_run_what_it_reads() -> None:
    found = {}
    for file in SOURCES:
        name = str(file.relative_to(ROOT))
        found |= {(name, danger): node for danger, node in dangers(file.read_text(encoding="utf-8"))}
    assert set(found) == set(ALLOWED)
    load = found["minipeft/models/checkpoint.py", "torch.load"]
    assert isinstance(load, ast.Call)
    assert {k.arg: getattr(k.value, "value", None) for k in load.keywords}["weights_only"] is True
    reader = next(
        node
        for node in ast.walk(ast.parse((ROOT / "minipeft/models/checkpoint.py").read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "read_legacy"
    )
    assert any(danger == "torch.load" for danger, _ in dangers(ast.unparse(reader)))


@pytest.mark.parametrize(
    "source",
    [
        "eval(x)",
        "import pickle",
        "from marshal import loads",
        "os.system(x)",
        "subprocess.run(x, shell=True)",
        "torch.load(f)",
        "importlib.import_module(n)",
        "__import__(n)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_the_rule_sees_what_it_is_for(source: str) -> None:
    assert list(dangers(source))


EVENTS = {"open", "exec", "compile", "import", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork",
          "socket.connect", "pickle.find_class", "ctypes.dlopen", "os.remove", "os.rename", "os.mkdir"}  # fmt: skip
WATCHED: list[tuple[str, str]] | None = None


def note(event: str, arguments: tuple[Any, ...]) -> None:
    if WATCHED is not None and event in EVENTS:
        WATCHED.append((event, str(arguments[0]) if arguments else ""))


sys.addaudithook(note)  # for good; idle unless something is watched


@contextmanager
def watched() -> Iterator[list[tuple[str, str]]]:
    global WATCHED
    WATCHED = []
    try:
        yield WATCHED
    finally:
        WATCHED = None


class Evil:
    """A pickle that creates a folder when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


CODE = "__import__('os').mkdir('ran')"
NAMES = ["../outside/secret", "/etc/passwd", "..", "https://example.org/x", "file:///etc/passwd", "secret\0", "~"]


def malicious(mark: Path) -> list[tuple[str, bytes]]:
    """(file of the folder, what it is replaced by): all kinds of content that some loader has been made to run."""
    evil = pickle.dumps(Evil(mark))
    header = lambda text: struct.pack("<Q", len(text)) + text
    config: list[dict[str, Any]] = [
        {"auto_map": {"AutoModelForCausalLM": "evil--evil.Model"}},
        {"_attn_implementation": "evil/kernel"},
        {"architectures": ["os.system"]},
        {"model_type": "../outside"},
        {"activation_function": CODE},
        {"trust_remote_code": True, "custom_pipelines": {"x": CODE}},
        {"_name_or_path": "../outside"},
        {"quantization_config": {"quant_method": CODE}},
        {"transformers_weights": "../outside/secret"},
    ]
    adapter: list[dict[str, Any]] = [
        {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
        {"megatron_core": "evil"},
        {"megatron_config": {"a": 1}},
        {"base_model_name_or_path": "../outside"},
        {"target_modules": CODE},
        {"tokenizer_kwargs": {"trust_remote_code": True}},
        {"peft_type": "os.system"},
        {"eva_config": {"x": CODE}},
        {"loftq_config": {"a": CODE}},
        {"corda_config": {"cache_file": "../outside/secret"}},
    ]
    settings: list[dict[str, Any]] = [
        {"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"},
        {"tokenizer_class": "os.system"},
        {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}},
        {"eos_token": {"__type": "AddedToken"}},
        {"tokenizer_file": "../outside/secret"},
        {"vocab_file": "/etc/passwd"},
    ]
    cases = [("config.json", changed) for changed in config] + [("tokenizer_config.json", s) for s in settings]
    made = [(name, json.dumps(value).encode()) for name, value in cases]
    made += [("adapter/adapter_config.json", json.dumps(value).encode()) for value in adapter]
    for name in (
        "model.safetensors",
        "adapter/adapter_model.safetensors",
        "pairs.jsonl",
        "tokenizer.json",
        "config.json",
        "adapter/adapter_config.json",
        "answers.jsonl",
    ):
        made += [(name, evil), (name, b"PK\x03\x04" + evil), (name, header(evil)), (name, CODE.encode())]
    for name in NAMES:
        index = {"metadata": {}, "weight_map": {"transformer.wte.weight": name}}
        made.append(("model.safetensors.index.json", json.dumps(index).encode()))
    made += [
        ("pytorch_model.bin", evil),
        ("adapter/adapter_model.bin", evil),
        ("modeling_evil.py", CODE.encode()),
        ("setup.py", CODE.encode()),
        ("adapter/__init__.py", CODE.encode()),
    ]
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound model with an adapter, pairs and answers; beside it `outside/secret`."""
    folder = write_small_model(tmp_path / "model", layers=1)
    model = load_model(folder)
    add_adapter(model, LoRAConfig(2, targets=("c_attn",)))
    save_adapter(model, folder / "adapter")
    write_pairs(folder / "pairs.jsonl", 4)
    (folder / "answers.jsonl").write_text('{"prediction": "x", "reference": "x"}\n')
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("secret")
    return folder


def load_all(folder: Path) -> int:
    """Read everything in the folder as the commands do; returns how many kinds were refused."""
    loaders: list[Callable[[], object]] = [
        lambda: load_tokenizer(folder),
        lambda: load_model(folder),
        lambda: load_pairs(folder / "pairs.jsonl"),
        lambda: read_answers(folder / "answers.jsonl"),
        lambda: load_model(folder, legacy_bin=True),
        lambda: load_adapter(load_model(folder), folder / "adapter"),
    ]
    refusals = 0
    for load in loaders:
        try:
            load()
        except InputError:
            refusals += 1
    return refusals


def test_a_malicious_corpus_runs_nothing_and_opens_nothing_outside(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    load_all(folder)  # what is imported once is imported now
    (folder / "pytorch_model.bin").write_bytes(b"")
    (folder / "model.safetensors").rename(folder / "away")
    load_all(folder)
    (folder / "away").rename(folder / "model.safetensors")
    (folder / "pytorch_model.bin").unlink()
    cases, refused = malicious(mark), 0
    assert len(cases) >= 60
    for name, data in cases:
        file = folder / name
        kept = file.read_bytes() if file.exists() else None
        if (
            file.suffix == ".json" and kept is not None and data[:1] == b"{"
        ):  # into what is there, so that it is reached
            data = json.dumps(json.loads(kept) | json.loads(data)).encode()
        single = folder / "model.safetensors"
        hidden = name in ("model.safetensors.index.json", "pytorch_model.bin")
        if hidden:
            single.rename(tmp_path / "hidden")
        file.write_bytes(data)
        with watched() as seen:
            refused += load_all(folder)
        assert not mark.exists(), name
        assert not Path("ran").exists(), name
        for event, what in seen:
            if event == "open" and os.path.isabs(what):
                inside = what.startswith(
                    (str(folder), sys.prefix, sys.base_prefix, "/usr", "/dev/null", "/proc", "/sys")
                )
                assert inside, f"{name} made {what} be opened"
            tried = event == "subprocess.Popen" and what == sys.executable  # a pattern, in a process of its own
            plain = event in ("exec", "compile") and CODE not in what and str(folder) not in what  # as dataclasses do
            assert event in ("open", "import") or plain or tried, (name, event, what)
        file.unlink() if kept is None else file.write_bytes(kept)
        if hidden:
            (tmp_path / "hidden").rename(single)
    assert refused >= 40
    assert load_all(folder) == 0, "all is as it was"


def test_the_watch_sees_what_it_is_for(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with watched() as seen, open(tmp_path / "p", "rb") as stream:
        pickle.load(stream)
    assert ("open", str(tmp_path / "p")) in seen
    assert any(event == "os.mkdir" for event, _ in seen)
    assert any(event == "pickle.find_class" for event, _ in seen)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_links_that_leave_the_folder(name: str, folder: Path, tmp_path: Path) -> None:
    """The target of a link is not read: neither a model's file nor a tokenizer's."""
    target = tmp_path / "outside" / name
    (folder / name).rename(target)
    (folder / name).symlink_to(target)
    with watched() as seen, suppress(InputError):
        load_tokenizer(folder) if name == "tokenizer.json" else load_model(folder)
    if name != "tokenizer.json":
        with pytest.raises(InputError, match="link that leaves the model folder"):
            load_model(folder)
        assert not any(str(target) in what or what == str(folder / name) for _, what in seen)


def test_a_checkpoint_of_a_run_is_no_door_either(folder: Path, tmp_path: Path) -> None:
    """The state of a run is safetensors and JSON; a pickle in their place counts as damage."""
    place = tmp_path / "run/checkpoints/step-000001"
    place.mkdir(parents=True)
    for name in (runs.STATE, runs.MANIFEST):
        (place / name).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(InputError):
        runs.verify(place)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(InputError, match="pickle"):
        runs.load_tensors(
            place / runs.STATE, load_model(folder).requires_grad_(True), runs.TrainState(torch.nn.Linear(1, 1))
        )


LIMITS = {"LARGEST_JSON": files, "LARGEST_HEADER": tensor_files, "LARGEST_FILE": reading, "LARGEST_ARRAY": reading,
          "MOST_LAYERS": planning, "DEADLINE": patterns, "LONGEST_PYTHON": text, "DEEPEST": dataflow}  # fmt: skip


def test_the_page_states_the_limits_that_the_code_has() -> None:
    page = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    stated = dict(re.findall(r"`([A-Z_]+)` = ([\d.]+) ", page + " "))
    assert {name: float(value) for name, value in stated.items()} == {
        name: float(getattr(module, name)) for name, module in LIMITS.items()
    }
    for named in re.findall(r"[\w/]*test_\w+\.py", page):
        assert list((ROOT / "tests").rglob(named.removeprefix("tests/"))), named
