"""Compile every live configuration of the Triton kernels for GPUs that are not here, and refuse what would run badly.

    python kernels/compile_check.py              # what changed since compiled.json, and a sample; exit 1 on a fault
    python kernels/compile_check.py --write      # compile all that is missing or stale, and write compiled.json
    python kernels/compile_check.py --architectures 90 --all

Refused: an error of the compiler, spilled registers, more shared memory than a program may have, a product that is not
done by the tensor cores, and more registers than compiled.json records. The list of configurations is tiles.live, which
is the list that the launcher picks from. compiled.json has a row for each (Triton version, architecture, configuration)
with the hash of the kernel's source, so that a review sees when a change costs registers, and CI compiles little.

No GPU and no driver are needed: Triton brings its own assembler. What this cannot say is how long a kernel takes.
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

from minipeft_kernels import tiles
from minipeft_kernels.tiles import Configuration

HERE = Path(__file__).resolve().parent
RECORD = HERE / "compiled.json"
DEVICE = HERE / "minipeft_kernels" / "device.py"
MATRIX = {80: ("HMMA",), 90: ("HGMMA", "HMMA"), 100: ("UTCHMMA", "UTCQMMA", "UTCIMMA", "HMMA")}  # tensor cores, in SASS
NEWEST = {"seeded_forward", "seeded_backward"}  # must use the architecture's own instruction, not that of its ancestors
NO_MATRIX = {"reduce", "rows_shrink", "rows_expand"}
FLOATS = {"shrink": set(), "gradient_B": {"dS", "dB"}, "gradient_A": {"dA"}, "reduce": {"parts"}}  # float32 pointers
POINTERS = {"x", "A", "W", "bias", "s", "B", "b", "y", "dx", "dS", "dA", "dB", "dy", "parts", "out", "owner", "scales"}


@dataclass(frozen=True)
class Result:
    """What the compiler made of one configuration: of each number the worst, where it has several variants."""

    triton: str
    architecture: int
    name: str
    source: str  # hash of the kernel's text and of all it calls
    registers: int
    spills: int  # bytes of local memory a thread
    shared: int  # bytes a program
    matrix: str  # the tensor-core instruction found, "" where there is none
    instructions: int

    @property
    def key(self) -> tuple[str, int, str]:
        return self.triton, self.architecture, self.name


def main() -> int:
    """Read the command line, compile, compare, and say what is wrong; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write compiled.json with what was compiled now")
    parser.add_argument("--all", action="store_true", help="compile all, not only what changed")
    parser.add_argument("--sample", type=int, default=2, help="unchanged ones to compile again, an architecture")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--architectures", type=int, nargs="+", default=tiles.ARCHITECTURES, help="80 90 100")
    arguments = parser.parse_args()
    version = importlib.metadata.version("triton")
    recorded = {result.key: result for result in read_record()}
    fresh: dict[tuple[str, int, str], Result] = {}
    faults: list[str] = []
    for architecture in arguments.architectures:
        live = {name_of(c): c for c in tiles.live(architecture)}
        known = {name: recorded.get((version, architecture, name)) for name in live}
        current = sorted(n for n, old in known.items() if old and old.source == source_hash(live[n].kernel))
        again = random.Random(arguments.seed).sample(current, min(arguments.sample, len(current)))
        for name in live if arguments.all else [n for n in live if n not in current or n in again]:
            result = compile_one(live[name], architecture, version)
            print(f"sm_{architecture} {name}: {show(result)}", flush=True)
            faults += faults_of(result, live[name], known[name])
            fresh[result.key] = result
    if arguments.write:
        now = {
            result.key: result for result in read_record()
        } | fresh  # another version may have been written meanwhile
        write_record([result for result in now.values() if is_live(result)])
    else:
        faults += [f"compiled.json: {r.key} is not what the sources say; run with --write" for r in stale(recorded)]
    for fault in faults:
        print(f"FAULT: {fault}")
    print(f"{len(fresh)} configurations compiled, {len(faults)} faults")
    return 1 if faults else 0


def name_of(configuration: Configuration) -> str:
    """Return a configuration as a short name: the key of compiled.json."""
    c, t = configuration, configuration.tile
    switches = f"{' dropout' if c.dropout else ''}{f' parts {c.parts}' if c.parts > 1 else ''}"
    return f"{c.kernel} {t.m}x{t.n}x{t.k} r{c.rank} {t.warps} warps {t.stages} stages{switches}"


def compile_one(configuration: Configuration, architecture: int, version: str) -> Result:
    """Compile a configuration with each set of constants that a launch may give it, and return the worst of each."""
    import triton
    from minipeft_kernels import device
    from triton.backends.compiler import GPUTarget

    kernel = getattr(device, configuration.kernel)
    options = {"num_warps": configuration.tile.warps, "num_stages": configuration.tile.stages}
    registers, spills, shared, matrix, instructions = [], [], [], [], []
    for constants in variants(configuration, kernel.arg_names):
        source = typed(kernel, configuration.kernel, constants)
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
        name=name_of(configuration),
        source=source_hash(configuration.kernel),
        registers=max(registers),
        spills=max(spills),
        shared=max(shared),
        matrix=(*MATRIX[architecture], "")[max(matrix)],
        instructions=max(instructions),
    )


def variants(c: Configuration, names: Iterable[str]) -> list[dict[str, object]]:
    """Return the constants of a configuration that its kernel takes: what launch.py passes by name, each way it does.

    An argument that is 1 at the launch is a constant too: T, the tokens a row, when decoding.
    """
    known = {
        "DROPOUT": c.dropout,
        "UPCAST": False,
        "GROUP": tiles.GROUP,
        "PARTS": c.parts,
        "B_ROWS_ARE_R": True,
        "BLOCK": c.tile.n,
        "BLOCK_M": c.tile.m,
        "BLOCK_N": c.tile.n,
        "BLOCK_K": c.tile.k,
        "BLOCK_R": c.rank,
    }
    if c.kernel == "reduce":
        del known["PARTS"]  # there it is a number known at the launch
    ways: dict[str, list[dict[str, object]]] = {
        "shrink": [{"SPLIT": 1}, {"SPLIT": tiles.SHRINK_SPLIT}],
        "seeded_forward": [{"BIAS": True}, {"BIAS": False}],
    }
    rows: list[dict[str, object]] = [{"OWNED": True, "T": 1}, {"OWNED": True}, {"OWNED": False}]
    ways |= {kernel: [way | {"SPLIT": tiles.ROWS_SPLIT} for way in rows] for kernel in ("rows_shrink", "rows_expand")}
    common = {name: known[name] for name in names if name in known}
    return [common | way for way in ways.get(c.kernel, [{}])]


def typed(kernel: object, name: str, constants: dict[str, object]) -> object:
    """Return a kernel as the compiler takes it, its arguments typed and aligned as those of a launch are."""
    from minipeft_kernels import device
    from triton.compiler import ASTSource

    names = kernel.arg_names  # type: ignore[attr-defined]
    signature = {n: "constexpr" if n in constants else type_of(n, name) for n in names}
    aligned = [
        i
        for i, n in enumerate(names)
        if signature[n].startswith("*") or (signature[n] == "i32" and n not in device.KEYS)
    ]
    return ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )


def type_of(name: str, kernel: str) -> str:
    """Return an argument's type in Triton's notation."""
    if name in ("owner", "scales"):
        return {"owner": "*i64", "scales": "*fp32"}[name]
    if name in POINTERS or re.fullmatch(r"(dy|W)_\d", name):
        wide = name in FLOATS.get(kernel, ()) or (name == "s" and kernel.startswith("rows_"))
        return "*fp32" if wide else "*bf16"
    return "fp32" if name == "factor" else "i32"


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Return what the driver would be told about resources, and the machine code as text."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = [[f"{tools}/cuobjdump", "--dump-resource-usage", file.name], [f"{tools}/nvdisasm", "-c", file.name]]
        outputs = [subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands]
    return outputs[0], outputs[1]


def faults_of(result: Result, c: Configuration, old: Result | None) -> list[str]:
    """Return what is wrong with a compilation, and what became worse since it was recorded."""
    where, found = f"sm_{result.architecture} {result.name}", []
    if result.spills:
        found.append(f"{where}: {result.spills} bytes of registers spilled to memory")
    if result.shared > tiles.SHARED_BYTES[result.architecture]:
        found.append(
            f"{where}: {result.shared} bytes of shared memory, {tiles.SHARED_BYTES[result.architecture]} exist"
        )
    if result.registers * c.tile.warps * 32 > 65536:
        found.append(f"{where}: {result.registers} registers a thread do not fit a multiprocessor")
    expected = MATRIX[result.architecture][: 1 if c.kernel in NEWEST else None]
    if c.kernel not in NO_MATRIX and result.matrix not in expected:
        found.append(f"{where}: found {result.matrix or 'no matrix instruction'}, expected one of {expected}")
    if old and old.source == result.source and result.registers > old.registers:
        found.append(f"{where}: {result.registers} registers, {old.registers} recorded")
    return found


def stale(recorded: dict[tuple[str, int, str], Result]) -> list[Result]:
    """Return the recorded rows, of any Triton version, that the sources or tiles.live have left behind."""
    kernels = {name_of(c): c.kernel for a in tiles.ARCHITECTURES for c in tiles.live(a)}
    return [r for r in recorded.values() if not is_live(r) or r.source != source_hash(kernels[r.name])]


def is_live(result: Result) -> bool:
    """Say whether the launcher can still ask for a recorded configuration."""
    return result.name in {name_of(c) for c in tiles.live(result.architecture)}


def source_hash(kernel: str) -> str:
    """Return a hash of a kernel's text, that of the functions it calls, and the constants of device.py."""
    tree = ast.parse(DEVICE.read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    wanted, seen = [kernel], set()
    while wanted:
        name = wanted.pop()
        seen.add(name)
        used = {node.id for node in ast.walk(functions[name]) if isinstance(node, ast.Name)}
        wanted += (used & functions.keys()) - seen
    text = [ast.unparse(_without_docstring(functions[name])) for name in sorted(seen)]
    text += [ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign)]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def _without_docstring(function: ast.FunctionDef) -> ast.FunctionDef:
    """Return a function without its first sentence: words do not change machine code."""
    has = isinstance(function.body[0], ast.Expr) and isinstance(function.body[0].value, ast.Constant)
    return ast.FunctionDef(**{**vars(function), "body": function.body[1:] if has else function.body})


def show(result: Result) -> str:
    """Return a result as a line."""
    matrix = result.matrix or "no matrix instruction"
    return f"{result.registers} registers, {result.spills} spilled, {result.shared} shared, {matrix}"


def read_record() -> list[Result]:
    """Return the committed rows."""
    return [Result(**row) for row in json.loads(RECORD.read_text())] if RECORD.exists() else []


def write_record(results: Iterable[Result]) -> None:
    """Write the rows in order, one a line, so that a change of registers is a line in review."""
    rows = [json.dumps(asdict(result)) for result in sorted(results, key=lambda result: result.key)]
    RECORD.write_text("[\n" + ",\n".join(rows) + "\n]\n")


if __name__ == "__main__":
    sys.exit(main())
