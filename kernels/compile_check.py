"""Compile every configuration of the Triton kernels for each GPU architecture and reject those that would run badly.

    python kernels/compile_check.py              # what changed since compiled.json, and a sample; exit 1 on a fault
    python kernels/compile_check.py --write      # compile all that is missing or stale, and write compiled.json
    python kernels/compile_check.py --architectures 90 --all

Rejected are compiler errors, spilled registers, shared memory above the limit, products that miss the tensor cores, and
more registers than compiled.json records. The configurations are tiles.list_configurations, from which the launcher
chooses. compiled.json has a row for each (Triton version, architecture, configuration) with a hash of the kernel's
source: a review sees when a change takes more registers, and CI compiles only what changed.

No GPU and no driver are needed: Triton brings its own assembler. This does not measure time.
"""

import argparse
import ast
import hashlib
import importlib.metadata
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minipeft_kernels import tiles
from minipeft_kernels.tiles import Configuration

HERE = Path(__file__).resolve().parent
RECORD = HERE / "compiled.json"
SOURCES = [HERE / "minipeft_kernels" / f"triton_{name}.py" for name in ("blocks", "kernels", "decode")]
MATRIX = {80: ("HMMA",), 90: ("HGMMA", "HMMA"), 100: ("UTCHMMA", "UTCQMMA", "UTCIMMA", "HMMA")}  # tensor cores, in SASS
NEWEST = {"seeded_forward", "seeded_backward"}  # must use the newest instruction of the architecture
NO_MATRIX = {"reduce", "rows_shrink", "rows_expand"}
FLOATS = {"shrink": set(), "gradient_B": {"dS", "dB"}, "gradient_A": {"dA"}, "reduce": {"parts"}}  # float32 pointers
POINTERS = {"x", "A", "W", "bias", "s", "B", "b", "y", "dx", "dS", "dA", "dB", "dy", "parts", "out", "owner", "scales"}


@dataclass(frozen=True)
class Result:
    """The resources of one compiled configuration: the worst of its variants."""

    triton: str
    architecture: int
    name: str
    source: str  # hash of the kernel's source and of all functions that it calls
    registers: int
    spills: int  # bytes of local memory a thread
    shared: int  # bytes a program
    matrix: str  # tensor-core instruction, "" for none
    instructions: int

    @property
    def key(self) -> tuple[str, int, str]:
        return self.triton, self.architecture, self.name


def main() -> int:
    """Compile, compare with compiled.json and print the faults; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="update compiled.json")
    parser.add_argument("--all", action="store_true", help="compile every configuration, not only what changed")
    parser.add_argument(
        "--sample", type=int, default=2, help="unchanged configurations to compile again, per architecture"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the sample")
    parser.add_argument("--architectures", type=int, nargs="+", default=tiles.ARCHITECTURES, help="80 90 100")
    arguments = parser.parse_args()
    version = importlib.metadata.version("triton")
    recorded = {result.key: result for result in read_record()}
    fresh: dict[tuple[str, int, str], Result] = {}
    faults: list[str] = []
    for architecture in arguments.architectures:
        live = {make_name(c): c for c in tiles.list_configurations(architecture)}
        known = {name: recorded.get((version, architecture, name)) for name in live}
        current = sorted(n for n, old in known.items() if old and old.source == hash_source(live[n].kernel))
        again = random.Random(arguments.seed).sample(current, min(arguments.sample, len(current)))
        for name in live if arguments.all else [n for n in live if n not in current or n in again]:
            result = compile_one(live[name], architecture, version)
            print(f"sm_{architecture} {name}: {format_result(result)}", flush=True)
            faults += find_faults(result, live[name], known[name])
            fresh[result.key] = result
    if arguments.write:
        now = {
            result.key: result for result in read_record()
        } | fresh  # another version may have been written meanwhile
        write_record([result for result in now.values() if can_be_launched(result)])
    else:
        faults += [f"compiled.json: {r.key} does not match the sources; run with --write" for r in find_stale(recorded)]
    for fault in faults:
        print(f"FAULT: {fault}")
    print(f"{len(fresh)} configurations compiled, {len(faults)} faults")
    return 1 if faults else 0


def make_name(configuration: Configuration) -> str:
    """Return the short name of a configuration: its key in compiled.json."""
    c, t = configuration, configuration.tile
    switches = f"{' dropout' if c.dropout else ''}{f' parts {c.parts}' if c.parts > 1 else ''}{' nf4' if c.nf4 else ''}"
    return f"{c.kernel} {t.m}x{t.n}x{t.k} r{c.rank} {t.warps} warps {t.stages} stages{switches}"


def compile_one(configuration: Configuration, architecture: int, version: str) -> Result:
    """Compile each variant of a configuration and return the largest figures."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = find_kernel(configuration.kernel)
    options = {"num_warps": configuration.tile.warps, "num_stages": configuration.tile.stages}
    registers, spills, shared, matrix, instructions = [], [], [], [], []
    for constants in list_variants(configuration, kernel.arg_names):
        source = make_source(kernel, configuration.kernel, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        usage, assembly = disassemble(compiled.asm["cubin"])
        used = {kind: int(count) for kind, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        registers.append(used["REG"])
        spills.append(used["STACK"] + used["LOCAL"])
        shared.append(compiled.metadata.shared)
        ranked = [i for i, name in enumerate(MATRIX[architecture]) if re.search(rf"\b{name}\b", assembly)]
        matrix.append(min(ranked, default=len(MATRIX[architecture])))
        instructions.append(len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s", assembly, re.MULTILINE)))
    return Result(
        triton=version,
        architecture=architecture,
        name=make_name(configuration),
        source=hash_source(configuration.kernel),
        registers=max(registers),
        spills=max(spills),
        shared=max(shared),
        matrix=(*MATRIX[architecture], "")[max(matrix)],
        instructions=max(instructions),
    )


def find_kernel(name: str) -> Any:
    """Return a kernel by its name."""
    from minipeft_kernels import triton_decode, triton_kernels

    return getattr(triton_kernels, name, None) or getattr(triton_decode, name)


def list_variants(c: Configuration, names: Iterable[str]) -> list[dict[str, object]]:
    """Return each set of constants that a launch may pass to the kernel of a configuration.

    Triton treats an argument that is 1 as a constant too: T, the tokens of a row, in decoding.
    """
    known = {
        "DROPOUT": c.dropout,
        "UPCAST": False,
        "GROUP": tiles.GROUP,
        "PARTS": c.parts,
        "NF4": c.nf4,
        "B_ROWS_ARE_R": True,
        "BLOCK": c.tile.n,
        "BLOCK_M": c.tile.m,
        "BLOCK_N": c.tile.n,
        "BLOCK_K": c.tile.k,
        "BLOCK_R": c.rank,
    }
    if c.kernel == "reduce":
        del known["PARTS"]  # a run-time argument of `reduce`
    ways: dict[str, list[dict[str, object]]] = {
        "shrink": [{"SPLIT": 1}, {"SPLIT": tiles.SHRINK_SPLIT}],
        "seeded_forward": [{"BIAS": True}, {"BIAS": False}],
    }
    rows: list[dict[str, object]] = [{"OWNED": True, "T": 1}, {"OWNED": True}, {"OWNED": False}]
    ways |= {kernel: [way | {"SPLIT": tiles.ROWS_SPLIT} for way in rows] for kernel in ("rows_shrink", "rows_expand")}
    common = {name: known[name] for name in names if name in known}
    return [common | way for way in ways.get(c.kernel, [{}])]


def make_source(kernel: Any, name: str, constants: dict[str, object]) -> object:
    """Return a kernel as source for the compiler, with the argument types and alignment of a launch."""
    from minipeft_kernels.triton_blocks import KEYS
    from triton.compiler import ASTSource

    names = kernel.arg_names
    nf4 = bool(constants.get("NF4"))
    signature = {n: "constexpr" if n in constants else find_type(n, name, nf4) for n in names}
    aligned = [
        i for i, n in enumerate(names) if signature[n].startswith("*") or (signature[n] == "i32" and n not in KEYS)
    ]
    return ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )


def find_type(name: str, kernel: str, nf4: bool = False) -> str:
    """Return an argument's type in Triton's notation."""
    if re.fullmatch(r"W(_\d)?", name) and nf4:
        return "*u8"
    if re.fullmatch(r"absmax(_\d)?|table", name):
        return "*fp32" if nf4 else "*bf16"  # without NF4 the weight is passed in its place
    if name in ("owner", "scales"):
        return {"owner": "*i64", "scales": "*fp32"}[name]
    if name in POINTERS or re.fullmatch(r"(dy|W)_\d", name):
        wide = name in FLOATS.get(kernel, ()) or (name == "s" and kernel.startswith("rows_"))
        return "*fp32" if wide else "*bf16"
    return "fp32" if name == "factor" else "i32"


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Return the resource usage and the machine code (SASS) of a cubin, as text."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = [[f"{tools}/cuobjdump", "--dump-resource-usage", file.name], [f"{tools}/nvdisasm", "-c", file.name]]
        outputs = [subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands]
    return outputs[0], outputs[1]


def find_faults(result: Result, c: Configuration, old: Result | None) -> list[str]:
    """Return the faults of a compilation, and regressions against its recorded row."""
    where, found = f"sm_{result.architecture} {result.name}", []
    if result.spills:
        found.append(f"{where}: {result.spills} bytes of registers spilled to memory")
    if result.shared > tiles.SHARED_BYTES[result.architecture]:
        found.append(
            f"{where}: {result.shared} bytes of shared memory, the limit is {tiles.SHARED_BYTES[result.architecture]}"
        )
    if result.registers * c.tile.warps * 32 > 65536:
        found.append(f"{where}: {result.registers} registers a thread exceed those of a multiprocessor")
    expected = MATRIX[result.architecture][: 1 if c.kernel in NEWEST else None]
    if c.kernel not in NO_MATRIX and result.matrix not in expected:
        found.append(f"{where}: found {result.matrix or 'no matrix instruction'}, expected one of {expected}")
    if old and old.source == result.source and result.registers > old.registers:
        found.append(f"{where}: {result.registers} registers, {old.registers} recorded")
    return found


def find_stale(recorded: dict[tuple[str, int, str], Result]) -> list[Result]:
    """Return the recorded rows, of any Triton version, whose kernel or tile has changed since."""
    kernels = {make_name(c): c.kernel for a in tiles.ARCHITECTURES for c in tiles.list_configurations(a)}
    return [r for r in recorded.values() if not can_be_launched(r) or r.source != hash_source(kernels[r.name])]


def can_be_launched(result: Result) -> bool:
    """Whether the launcher can still choose a recorded configuration."""
    return result.name in {make_name(c) for c in tiles.list_configurations(result.architecture)}


def hash_source(kernel: str) -> str:
    """Return a hash of the source of a kernel, of the functions that it calls, and of the module constants."""
    nodes = [node for path in SOURCES for node in ast.parse(path.read_text()).body]
    functions = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}
    wanted, seen = [kernel], set()
    while wanted:
        name = wanted.pop()
        seen.add(name)
        used = {node.id for node in ast.walk(functions[name]) if isinstance(node, ast.Name)}
        wanted += (used & functions.keys()) - seen
    text = [ast.unparse(_without_docstring(functions[name])) for name in sorted(seen)]
    text += [ast.unparse(node) for node in nodes if isinstance(node, ast.Assign)]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def _without_docstring(function: ast.FunctionDef) -> ast.FunctionDef:
    """Return a function without its docstring, which does not change the machine code."""
    has = isinstance(function.body[0], ast.Expr) and isinstance(function.body[0].value, ast.Constant)
    return ast.FunctionDef(**{**vars(function), "body": function.body[1:] if has else function.body})


def format_result(result: Result) -> str:
    """Return a result as one line."""
    matrix = result.matrix or "no matrix instruction"
    return f"{result.registers} registers, {result.spills} spilled, {result.shared} shared, {matrix}"


def read_record() -> list[Result]:
    """Return the committed rows."""
    return [Result(**row) for row in json.loads(RECORD.read_text())] if RECORD.exists() else []


def write_record(results: Iterable[Result]) -> None:
    """Write the rows sorted, one a line, so that a diff shows each changed configuration."""
    rows = [json.dumps(asdict(result)) for result in sorted(results, key=lambda result: result.key)]
    RECORD.write_text("[\n" + ",\n".join(rows) + "\n]\n")


if __name__ == "__main__":
    sys.exit(main())
