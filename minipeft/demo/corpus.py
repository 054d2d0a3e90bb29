"""The pretraining text of the demo model: Python sources of the running installation, cut into documents.

Five kinds of document, so that a model of a few million parameters sees words beside the code they describe:

    source      a stretch of a file of the standard library (not its tests), ending between top-level statements
    function    a function with the first sentence of its docstring in front, the docstring taken out of the body
    comment     a comment block and the one to six lines under it, where these parse alone
    example     a paragraph of a docstring and the lines that it shows behind `>>>`
    reference   a signature of a builtin or a C module under the first sentence of its help text

A second stage reads the sixth kind, with a share of the others so that they are not forgotten:

    pair        a request in words and the code that does it (make_pairs.make_general_pairs), in one of LAYOUTS

It teaches copying of names, texts and numbers from a request into code, which the first stage cannot in so few tokens.
Neither stage contains the demo's task (pairs.jsonl): no code of its house library, none of its wordings or template,
and no name of its test questions.
"""

import ast
import builtins
import hashlib
import importlib
import importlib.util
import inspect
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from minipeft.demo.make_pairs import draw, make_general_pairs
from minipeft.files import write_json

END = "<|endoftext|>"
# Packages that are read where they are installed, each with the licence that it declares; all are permissive.
PACKAGES = {
    "numpy": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "mpmath": "BSD-3-Clause",
    "networkx": "BSD-3-Clause",
    "matplotlib": "PSF-based",
    "torch": "BSD-3-Clause",
    "jinja2": "BSD-3-Clause",
    "pygments": "BSD-2-Clause",
    "fsspec": "BSD-3-Clause",
    "setuptools": "MIT",
    "rich": "MIT",
    "click": "BSD-3-Clause",
    "pydantic": "MIT",
    "mypy": "MIT",
    "packaging": "Apache-2.0 or BSD-2-Clause",
    "dateutil": "Apache-2.0 or BSD-3-Clause",
}
REFERENCE_MODULES = """bisect collections datetime functools hashlib heapq itertools json math operator os os.path
pathlib random re shutil statistics string struct sys textwrap time urllib.parse"""
LAYOUTS = (  # of a pair; the task's own template (### Instruction) is none of them
    "# {intent}\n{snippet}\n",
    "{intent}\n{snippet}\n",
    '"""{intent}"""\n{snippet}\n',
    "Task: {intent}\nCode: {snippet}\n",
    "<request>{intent}</request>\n<code>{snippet}</code>\n",
    ">>> # {intent}\n>>> {snippet}\n",
)
REFERENCE_TIMES = 4  # there are only about 900 of them
# a paragraph of prose, a blank line or none, then lines behind the prompts
UNDERLINED = re.compile(r"^.*\n\s*[-=~]{3,}$", re.M)  # a heading
PARAGRAPH_AND_EXAMPLE = re.compile(
    r"((?:^[A-Z`(][^\n]*[\w,.:`) ]\n)(?:^(?!>>> )[^\n]+\n)*)\n?((?:^(?:>>>|\.\.\.) [^\n]*\n?)+)", re.M
)
SOURCE_CHARACTERS = 6000  # a source document ends at the first top-level statement after this many
FUNCTION_CHARACTERS = 1500
COMMENT_CHARACTERS = 600
FILE_CHARACTERS = 400_000  # longer files are tables, not code, except pydoc's topics, which are prose
HELD_OUT_ONE_IN = 60


@dataclass(frozen=True)
class Document:
    kind: str
    text: str
    held_out: bool


def list_source_files(packages: list[str] | None = None) -> list[tuple[str, Path]]:
    """List (name, path) of every source, sorted: the standard library, then each package that is installed."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    roots = [("stdlib", stdlib)]
    for package in PACKAGES if packages is None else packages:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            roots.append((package, Path(spec.origin).parent))
    found = []
    for name, root in roots:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts
            foreign = {"site-packages", "dist-packages", "_vendor", "lib2to3", "third_party"} & set(parts)
            if path.name == "topics.py" or (not foreign and path.stat().st_size < FILE_CHARACTERS):
                found.append((f"{name}/{'/'.join(parts)}", path))
    return found


def is_held_out(name: str) -> bool:
    """Whether a file is held out: one in HELD_OUT_ONE_IN, chosen by the hash of its name, the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT_ONE_IN == 0


def find_first_sentence(text: str) -> str:
    """The first sentence of a help text, on one line."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    stop = paragraph.find(". ")
    return paragraph if stop < 0 else paragraph[: stop + 1]


def make_source_documents(text: str, tree: ast.Module) -> Iterator[str]:
    lines = text.splitlines(keepends=True)
    start = 0
    for statement in tree.body:
        end = statement.end_lineno or 0
        if sum(map(len, lines[start:end])) >= SOURCE_CHARACTERS:
            yield "".join(lines[start:end])
            start = end
    yield "".join(lines[start:])


def make_function_documents(text: str, tree: ast.Module) -> Iterator[str]:
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
            continue
        described = ast.get_docstring(node)
        if not described:
            continue
        head = lines[node.lineno - 1 : node.body[0].lineno - 1]
        body = lines[node.body[0].end_lineno or 0 : node.end_lineno]
        code = textwrap.dedent("".join(head + body)).strip("\n")
        if len(code) <= FUNCTION_CHARACTERS and head:
            yield f"{find_first_sentence(described)}\n{code}\n"


def make_comment_documents(text: str) -> Iterator[str]:
    lines = text.splitlines()
    place = 0
    while place < len(lines):
        start = place
        while place < len(lines) and lines[place].lstrip().startswith("#"):
            place += 1
        if place == start:
            place += 1
            continue
        words = " ".join(line.strip().lstrip("#").strip() for line in lines[start:place])
        indent = len(lines[start]) - len(lines[start].lstrip())
        end = place
        while end < len(lines) and lines[end].strip() and not lines[end].lstrip().startswith("#"):
            if len(lines[end]) - len(lines[end].lstrip()) < indent:
                break
            end += 1
        code = textwrap.dedent("\n".join(lines[place:end]))
        fits = 0 < end - place <= 6 and len(words.split()) >= 3 and len(words) + len(code) <= COMMENT_CHARACTERS
        if fits and parse(code) is not None:
            yield f"{words}\n{code}\n"


def make_example_documents(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            continue
        for words, block in PARAGRAPH_AND_EXAMPLE.findall(UNDERLINED.sub("\n", ast.get_docstring(node) or "")):
            code = "\n".join(line[4:] for line in block.splitlines())
            if len(words.split()) >= 3 and code.count("\n") < 6 and parse(code) is not None:
                yield f"{' '.join(words.split())}\n{code}\n"


def make_reference_documents() -> Iterator[str]:
    kinds = (str, bytes, list, dict, set, frozenset, tuple, int, float, complex, object, range, slice)
    owners = [(kind.__name__ + ".", kind) for kind in kinds] + [("", builtins)]
    owners += [(name + ".", importlib.import_module(name)) for name in REFERENCE_MODULES.split()]
    for prefix, owner in owners:
        for name in sorted(vars(owner)):
            described = inspect.getdoc(getattr(owner, name)) if not name.startswith("_") else None
            if described and callable(getattr(owner, name)):
                try:
                    signature = str(inspect.signature(getattr(owner, name)))
                except ValueError:  # a C function without one
                    signature = "(...)"
                yield f"{find_first_sentence(described)}\n{prefix}{name}{signature}\n"


def parse(code: str) -> ast.Module | None:
    """The syntax tree of `code`, or None where it is not Python (the standard library's tests hold such files)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError):
        return None


def make_documents(files: list[tuple[str, Path]]) -> Iterator[Document]:
    """Read each file once and yield its documents of every kind, each text once."""
    seen: set[bytes] = set()
    for name, path in files:
        text = path.read_bytes().decode("utf-8", errors="replace").expandtabs(4).replace("\r\n", "\n")
        tree = parse(text)
        if tree is None:
            continue
        kinds = {
            "function": make_function_documents(text, tree),
            "comment": make_comment_documents(text),
            "example": make_example_documents(tree),
        }
        if name.startswith("stdlib/") and "/test" not in name:
            kinds["source"] = make_source_documents(text, tree)
        for kind, texts in kinds.items():
            for each in texts:
                key = hashlib.sha256(each.encode("utf-8", errors="replace")).digest()[:12]
                if each.strip() and key not in seen:
                    seen.add(key)
                    yield Document(kind, each, is_held_out(name))
    for each in REFERENCE_TIMES * list(make_reference_documents()):
        yield Document("reference", each, False)


def make_pair_documents(times: int, seed: int = 0) -> Iterator[Document]:
    """General pairs of a request and its code: each wording is filled `times` times, each time in another layout."""
    for place, (intent, snippet) in enumerate(make_general_pairs(times, seed)):
        text = draw(LAYOUTS, "layout", seed, place).replace("{intent}", intent).replace("{snippet}", snippet)
        yield Document("pair", text, is_held_out(f"pair/{seed}/{place}"))


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """Learn a byte-level BPE of `vocab` tokens (Sennrich et al. 2016; GPT-2's alphabet and word pattern)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def cut_pieces(texts: list[str], tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """The ids of each text followed by END, cut into chunks of at most `length`."""
    end = tokenizer.get_vocab()[END]
    found: list[list[int]] = []
    for start in range(0, len(texts), 1000):
        for encoding in tokenizer.encode_batch(texts[start : start + 1000]):
            ids = [*encoding.ids, end]
            found += [ids[place : place + length] for place in range(0, len(ids), length)]
    return found


def save_tokenizer(tokenizer: Tokenizer, folder: Path, length: int) -> None:
    """Write tokenizer.json, and beside it the file that transformers reads with it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length, **names}
    write_json(folder / "tokenizer_config.json", settings)
