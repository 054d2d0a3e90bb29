"""Bad checkpoints: each is a valid folder with one fault, and the text of the expected error.

`CHECKPOINTS` is the table, by the numbers of the project's list of bad inputs (C config.json, S safetensors, I index; a
letter after the number is another fault of that kind). Tests reach it through the fixture `bad_checkpoint` of
tests/conftest.py: load_model and the command line have to refuse every one of them alike.
"""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float32",
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "vocab_size": 512, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
CONFIGS = {"llama": LLAMA, "mistral": LLAMA | {"model_type": "mistral", "sliding_window": 16}, "gpt2": GPT2}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Tensors = dict[str, np.ndarray]


def weights(family: str) -> Tensors:
    """Random float32 tensors of the family's tiny config, under Hugging Face's names and in its layout."""
    if family == "gpt2":
        shapes: dict[str, tuple[int, ...]] = {"wte.weight": (512, 32), "wpe.weight": (64, 32), "ln_f.weight": (32,)}
        shapes["ln_f.bias"] = (32,)
        linears = {"attn.c_attn": (32, 96), "attn.c_proj": (32, 32), "mlp.c_fc": (32, 128), "mlp.c_proj": (128, 32)}
        for layer in range(2):
            for name, (ins, outs) in linears.items():
                shapes |= {f"h.{layer}.{name}.weight": (ins, outs), f"h.{layer}.{name}.bias": (outs,)}
            for norm in ("ln_1", "ln_2"):
                shapes |= {f"h.{layer}.{norm}.weight": (32,), f"h.{layer}.{norm}.bias": (32,)}
        shapes = {f"transformer.{name}": shape for name, shape in shapes.items()}
    else:
        shapes = {"model.embed_tokens.weight": (512, 32), "model.norm.weight": (32,), "lm_head.weight": (512, 32)}
        linears = {
            "self_attn.q_proj": (32, 32),
            "self_attn.k_proj": (16, 32),
            "self_attn.v_proj": (16, 32),
            "self_attn.o_proj": (32, 32),
            "mlp.gate_proj": (48, 32),
            "mlp.up_proj": (48, 32),
            "mlp.down_proj": (32, 48),
        }
        for layer in range(2):
            shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in linears.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"model.layers.{layer}.{norm}.weight"] = (32,)
    draw = np.random.default_rng(0)
    return {name: draw.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


def header_of(tensors: Tensors) -> dict[str, dict]:
    """The header of a safetensors file of these tensors, in their order."""
    names = {"float32": "F32", "float64": "F64", "int64": "I64", "float16": "F16"}
    header, start = {}, 0
    for name, t in tensors.items():
        offsets = [start, start + t.nbytes]
        header[name] = {"dtype": names[str(t.dtype)], "shape": list(t.shape), "data_offsets": offsets}
        start += t.nbytes
    return header


def write_safetensors(file: Path, tensors: Tensors, header: object = None) -> None:
    """Write the bytes as they are, without checking the header."""
    header = header_of(tensors) if header is None else header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(t.tobytes() for t in tensors.values()))


def write_sharded(folder: Path) -> None:
    """The same weights in two files and an index."""
    tensors = weights("llama")
    shards: dict[str, Tensors] = {f"model-0000{n}-of-00002.safetensors": {} for n in (1, 2)}
    for place, name in enumerate(tensors):
        shards[list(shards)[place % 2]][name] = tensors[name]
    for name, held in shards.items():
        write_safetensors(folder / name, held)
    total = sum(t.nbytes for t in tensors.values())
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (folder / SINGLE).unlink(missing_ok=True)


def write_sound(folder: Path, family: str = "llama") -> None:
    """The valid checkpoint that receives each fault; `outside/` beside it holds files that must never be opened."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[family], indent=1))
    write_safetensors(folder / SINGLE, weights(family))
    outside = folder.parent / "outside"
    outside.mkdir()
    write_safetensors(outside / SINGLE, weights(family))
    (outside / "config.json").write_text(json.dumps(CONFIGS[family]))


@dataclass(frozen=True)
class BadCheckpoint:
    """One fault. `spoil` puts it into a sound folder; the error's text must hold each of `says`."""

    name: str
    spoil: Callable[[Path], object]
    says: tuple[str, ...]
    family: str = "llama"

    def make(self, folder: Path) -> None:
        write_sound(folder, self.family)
        self.spoil(folder)


# Ways to spoil.


def config(**changes: object) -> Callable[[Path], None]:
    """Change fields of config.json; `...` takes one out."""

    def spoil(folder: Path) -> None:
        given = {**json.loads((folder / "config.json").read_text()), **changes}
        text = json.dumps({name: value for name, value in given.items() if value is not ...})
        (folder / "config.json").write_text(text)

    return spoil


def put(name: str, data: bytes | str) -> Callable[[Path], object]:
    """Write a file."""
    return lambda folder: (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def cut(name: str, keep: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Replace a file by a part of it, or more than it."""
    return lambda folder: (folder / name).write_bytes(keep((folder / name).read_bytes()))


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def in_turn(*spoils: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [spoil(folder) for spoil in spoils]


def directory(name: str) -> Callable[[Path], object]:
    return in_turn(remove(name), lambda folder: (folder / name).mkdir())


def pipe(name: str) -> Callable[[Path], object]:
    """A named pipe: opening it blocks."""
    return in_turn(remove(name), lambda folder: os.mkfifo(folder / name))


def link_out(name: str) -> Callable[[Path], object]:
    """A link to a sound file of another folder."""
    target = "config.json" if name == "config.json" else SINGLE
    return in_turn(remove(name), lambda folder: (folder / name).symlink_to(folder.parent / "outside" / target))


def tensor(name: str, value: np.ndarray | None) -> Callable[[Path], None]:
    """Replace, add or (None) take out a tensor of model.safetensors."""

    def spoil(folder: Path) -> None:
        tensors = weights(json.loads((folder / "config.json").read_text())["model_type"])
        tensors = {key: t for key, t in {**tensors, name: value}.items() if t is not None}
        write_safetensors(folder / SINGLE, tensors)

    return spoil


def header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Change what the header of model.safetensors says, and leave the data."""

    def spoil(folder: Path) -> None:
        tensors = weights("llama")
        said = header_of(tensors)
        write_safetensors(folder / SINGLE, tensors, change(said) or said)

    return spoil


def entry(**changes: object) -> Callable[[Path], None]:
    """Change the header's entry of the first tensor."""
    return header(lambda said: said["model.embed_tokens.weight"].update(changes))


def index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Write the weights as two shards and change the index."""

    def spoil(folder: Path) -> None:
        write_sharded(folder)
        said = json.loads((folder / INDEX).read_text())
        said = change(said) or said
        (folder / INDEX).write_text(json.dumps(said))

    return spoil


def unchanged(said: dict) -> None:
    """Leave the index as it is."""


def shard_named(name: str) -> Callable[[Path], None]:
    """Let the index put one tensor into a file of this name."""
    return index(lambda said: said["weight_map"].update({"model.norm.weight": name}))


def holding(value: float) -> np.ndarray:
    wrong = weights("llama")["lm_head.weight"].copy()
    wrong[7, 3] = wrong[9, 1] = value
    return wrong


Q = "model.layers.1.self_attn.q_proj.weight"
BAD_TENSOR = (SINGLE, "tensor 'model.embed_tokens.weight'")
SHARD2 = "model-00002-of-00002.safetensors"


def cases_of_config() -> list[tuple]:
    F = "config.json"
    return [
        ("C01", remove(F), ("no config.json", "found: model.safetensors")),
        ("C02", put(F, ""), (F, "not valid JSON: line 1 column 1")),
        ("C03", cut(F, lambda b: b[: len(b) // 2]), (F, "not valid JSON: line")),
        ("C03b trailing text", cut(F, lambda b: b + b" x"), (F, "not valid JSON: line", "Extra data")),
        ("C04", put(F, "[1, 2]"), (F, "must hold a JSON object, but holds a list")),
        ("C05", config(model_type="foo"), (F, "model_type: 'foo' is not supported (gpt2, llama, mistral, ")),
        ("C05b a list", config(model_type=["llama"]), (F, "model_type: ['llama'] is not supported")),
        ("C06", config(model_type=...), (F, "model_type", "gpt2, llama, mistral")),
        ("C08", config(hidden_size=-32), (F, "hidden_size: -32 must be an integer in [1, 2^20]")),
        ("C09", config(hidden_size=0), (F, "hidden_size: 0 must be an integer in [1, 2^20]")),
        ("C09b text", config(hidden_size="32"), (F, "hidden_size: '32' must be an integer in [1, 2^20]")),
        ("C09c a fraction", config(hidden_size=32.5), (F, "hidden_size: 32.5 must be an integer in [1, 2^20]")),
        (
            "C09d a boolean",
            config(num_hidden_layers=True),
            (F, "num_hidden_layers: True must be an integer in [1, 2^31)"),
        ),
        ("C09e null", config(intermediate_size=None), (F, "intermediate_size: None must be an integer in [1, 2^20]")),
        ("C10", config(num_attention_heads=5), (F, "num_attention_heads: 5 does not divide hidden_size 32")),
        ("C11", config(num_key_value_heads=3), (F, "num_key_value_heads: 3 does not divide num_attention_heads 4")),
        ("C11b odd heads", config(head_dim=7), (F, "head_dim: 7 must be even")),
        ("C12", config(vocab_size=200), (*BAD_TENSOR, "[512, 32]", "vocab_size", "[200, 32]")),
        ("C13", config(vocab_size=10**12), (F, "vocab_size: 1000000000000 must be")),
        ("C13b 1e100", config(vocab_size=10**100), (F, "vocab_size: an integer of 333 bits must be")),
        ("C13c 5000 digits", put(F, '{"model_type": "llama", "vocab_size": ' + "9" * 5000 + "}"), (F, "digits")),
        ("C13d width", config(hidden_size=10**12), (F, "hidden_size: 1000000000000 must be")),
        ("C13e heads", config(head_dim=10**15), (F, "head_dim: 1000000000000000 must be")),
        ("C13f inner width", config(intermediate_size=2**20), (SINGLE, "mlp", "[1048576, 32]")),
        ("C13g vocabulary", config(vocab_size=2**31 - 1), (*BAD_TENSOR, "vocab_size")),
        ("C14", config(num_hidden_layers=10**6), (F, "num_hidden_layers: 1000000, but the weights hold 2")),
        ("C15", config(num_hidden_layers=1), (F, "num_hidden_layers: 1, but the weights hold 2")),
        ("C16", config(num_hidden_layers=3), (F, "num_hidden_layers: 3, but the weights hold 2")),
        ("C17", config(rope_theta=0), (F, "rope_theta: 0 must be finite and > 0")),
        ("C17b v5", config(rope_parameters={"rope_theta": 0}), (F, "rope_theta: 0 must be finite and > 0")),
        ("C17c null", config(rope_theta=None), (F, "rope_theta: None must be finite and > 0")),
        ("C18", config(rms_norm_eps=float("nan")), (F, "NaN is not JSON (key 'rms_norm_eps')")),
        (
            "C18b 1e999",
            cut(F, lambda b: b.replace(b"1e-05", b"1e999")),
            (F, "beyond 1.8e308, is not JSON (key 'rms_norm_eps')"),
        ),
        ("C18c negative", config(rms_norm_eps=-1e-5), (F, "rms_norm_eps: -1e-05 must be finite and > 0")),
        (
            "C18d in a list",
            config(rope_scaling={"x": [1, float("inf")]}),
            (F, "Infinity, or a number beyond 1.8e308, is not JSON (key 'x')"),
        ),
        ("C19", cut(F, lambda b: b.replace(b"{", b'{"hidden_size": 64,', 1)), (F, "key 'hidden_size' given twice")),
        ("C20", config(hidden_act="nope"), (F, "hidden_act: 'nope' is not known (gelu")),
        ("C20b null", config(hidden_act=None), (F, "hidden_act: None is not known (gelu")),
        ("C22", directory(F), (F, "is a directory")),
        ("C22b a pipe", pipe(F), (F, "is not a plain file")),
        ("C23", cut(F, lambda b: b.replace(b"silu", b"sil\xfc")), (F, "not UTF-8 at byte")),
        ("C23b UTF-16", cut(F, lambda b: b.decode().encode("utf-16")), (F, "not UTF-8 at byte 0")),
        ("C24", config(dtype="float99"), (F, "dtype: 'float99' is not supported (float32, float16, bfloat16)")),
        ("C24b torch_dtype", config(torch_dtype=["float32"]), (F, "torch_dtype: ['float32'] is not supported")),
        ("C25", tensor("lm_head.weight", None), ("tie_word_embeddings is false", "lm_head.weight is missing")),
        ("C25b tied, another head", config(tie_word_embeddings=True), (SINGLE, "'lm_head.weight'", "differs")),
        ("C26", config(max_position_embeddings=0), (F, "max_position_embeddings: 0 must be an integer in [1, 2^31)")),
        ("C27", config(attention_dropout=2.0), (F, "attention_dropout: 2.0 must be in [0, 1)")),
        ("C28", config(rope_scaling={"rope_type": "magic"}), (F, "rope_scaling: rope type 'magic' is not supported")),
        ("C28b dynamic", config(rope_scaling={"type": "dynamic", "factor": 2.0}), (F, "rope type 'dynamic' is not")),
        ("C28c a number", config(rope_scaling=8), (F, "rope_scaling: 8 is not an object")),
        ("C30", config(sliding_window=-1), (F, "sliding_window: -1 must be an integer in [1, 2^31)"), "mistral"),
        ("C30b quantized", config(quantization_config={"bits": 4}), (F, "quantization_config", "not supported")),
        ("C31 nested", put(F, '{"a":' * 100_000 + "1" + "}" * 100_000), (F, "nested too deep")),
        ("C32 link out", link_out(F), (F, "link that leaves the model folder")),
        (
            "C33 many keys, one twice",
            put(F, "{" + ",".join(f'"k{i % 99_999}":1' for i in range(100_000)) + "}"),
            (F, "key 'k0' given twice"),
        ),
        ("C08 gpt2", config(n_embd=-32), (F, "n_embd: -32 must be an integer in [1, 2^20]"), "gpt2"),
        ("C10 gpt2", config(n_head=5), (F, "n_head: 5 does not divide n_embd 32"), "gpt2"),
        ("C13 gpt2", config(n_inner=10**18), (F, "n_inner: 1000000000000000000 must be"), "gpt2"),
        ("C14 gpt2", config(n_layer=10**6), (F, "n_layer: 1000000, but the weights hold 2"), "gpt2"),
        ("C26 gpt2", config(n_positions=0), (F, "n_positions: 0 must be an integer in [1, 2^31)"), "gpt2"),
        ("C26b gpt2, longer", config(n_positions=128), (SINGLE, "wpe.weight", "[64, 32]", "[128, 32]"), "gpt2"),
        ("C27 gpt2", config(resid_pdrop=1.0), (F, "resid_pdrop: 1.0 must be in [0, 1)"), "gpt2"),
        ("C34 cross-attention", config(add_cross_attention=True), (F, "add_cross_attention", "not supported"), "gpt2"),
    ]


def cases_of_safetensors() -> list[tuple]:
    F = SINGLE
    lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 269060552\n"
    big = struct.pack("<Q", 2**63)
    return [
        ("S01", remove(F), ("no model.safetensors", "found: config.json")),
        ("S02", put(F, b""), (F, "too short to be safetensors: 0 bytes")),
        ("S03", put(F, struct.pack("<Q", 1000) + b"{}"), (F, "its header says 1000 bytes, the file has 10")),
        ("S04", put(F, big + b"{}" * 50), (F, "its header says 9223372036854775808 bytes, the file has 108")),
        ("S05", cut(F, lambda b: b[:-1]), (F, "data incomplete: needs", "download broken?")),
        ("S06", cut(F, lambda b: b[: len(b) // 2]), (F, "data incomplete: needs")),
        ("S07", cut(F, lambda b: b + b"\0"), (F, "trailing bytes: needs")),
        ("S08", header(lambda h: h["lm_head.weight"].update(data_offsets=[0, 65536])), (F, "tensor ", "overlap")),
        ("S08b gap", header(lambda h: h.pop("model.norm.weight") and None), (F, "tensor ", "leave a gap")),
        ("S08c backwards", entry(data_offsets=[65536, 0]), (*BAD_TENSOR, "do not fit")),
        ("S09", entry(dtype="F99"), (*BAD_TENSOR, "unknown dtype 'F99'")),
        ("S09b a list", entry(dtype=["F32"]), (*BAD_TENSOR, "unknown dtype ['F32']")),
        ("S10", entry(shape=[2**62, 2**62]), (*BAD_TENSOR, "do not fit F32")),
        ("S10b beyond 63 bits", entry(shape=[2**64, 1]), (*BAD_TENSOR, "must be lists of integers")),
        ("S10c negative", entry(shape=[-512, -32]), (*BAD_TENSOR, "must be lists of integers >= 0")),
        ("S10d booleans", entry(shape=[True, 16384]), (*BAD_TENSOR, "must be lists of integers")),
        (
            "S11",
            tensor(Q, np.zeros((32, 31), np.float32)),
            (F, f"tensor '{Q}'", "[32, 31], want [32, 32]", "config.json"),
        ),
        ("S11b more axes", tensor(Q, np.zeros((32, 32, 1), np.float32)), (F, f"tensor '{Q}'", "[32, 32, 1]")),
        ("S12", tensor(Q, None), (F, "missing tensors", Q, "1 in all")),
        ("S13", tensor("foo", np.zeros(3, np.float32)), (F, "unexpected tensors: foo (1 in all)")),
        (
            "S13b a bias",
            tensor(Q.replace("weight", "bias"), np.zeros(32, np.float32)),
            (F, "q_proj.bias", "unexpected"),
        ),
        ("S14", tensor("lm_head.weight", holding(float("nan"))), (F, "'lm_head.weight'", "NaN or Inf (2 of 16384")),
        ("S14b Inf", tensor("lm_head.weight", holding(float("inf"))), (F, "'lm_head.weight'", "NaN or Inf (2 of")),
        ("S15", tensor(Q, np.zeros((32, 32), np.int64)), (F, f"tensor '{Q}'", "dtype I64, want F32/F16/BF16")),
        ("S15b F64", tensor(Q, np.zeros((32, 32))), (F, f"tensor '{Q}'", "dtype F64, want F32/F16/BF16")),
        ("S16", put(F, lfs), (F, "is a git-lfs pointer, not the weights: run `git lfs pull`")),
        ("S17", put(F, "<!DOCTYPE html><html><body>404"), (F, "looks like an HTML page")),
        ("S18", put(F, b"PK\x03\x04" + b"\0" * 99 + b"\xff" * 99), (F, "looks like a pickle")),
        ("S18b bare pickle", put(F, b"\x80\x04\x95\x0b\0\0\0\0\0\0\0\x8c\x02os\x94."), (F, "looks like a pickle")),
        (
            "S19",
            in_turn(remove(F), put("pytorch_model.bin", b"never read")),
            ("no model.safetensors", "found: config.json, pytorch_model.bin", "legacy_bin=True"),
        ),
        (
            "S20",
            header(lambda h: {f"encoder.{name}": said for name, said in h.items()}),
            (F, "no tensor 'model.layers.0.", "encoder.lm_head.weight"),
        ),
        ("S21 no tensor", lambda folder: write_safetensors(folder / F, {}), (F, "no tensor")),
        ("S22 not UTF-8", put(F, struct.pack("<Q", 4) + b"{\xff\xff}"), (F, "header is not UTF-8 at byte 9")),
        ("S23 not JSON", put(F, struct.pack("<Q", 4) + b"{...}"[:4]), (F, "header", "not valid JSON")),
        ("S24 a list", put(F, struct.pack("<Q", 2) + b"[]"), (F, "header must be an object, but is a list")),
        ("S25 metadata", header(lambda h: {"__metadata__": 5, **h}), (F, "__metadata__", "must map text to text")),
        ("S25b numbers", header(lambda h: {"__metadata__": {"a": 1}, **h}), (F, "__metadata__", "must map text")),
        (
            "S26 twice",
            cut(F, lambda b: (t := b"{" + b'"a":1,"a":1' + b"}") and struct.pack("<Q", len(t)) + t),
            (F, "key 'a' given twice"),
        ),
        ("S27 half an entry", entry(extra=1), (*BAD_TENSOR, "must have dtype, shape and data_offsets")),
        (
            "S28 a number",
            header(lambda h: {**h, "model.norm.weight": 7}),
            (F, "'model.norm.weight'", "must have dtype"),
        ),
        ("S29 lone surrogate", header(lambda h: {**h, "\ud800": h.pop("model.norm.weight")}), (F, r"\ud800")),
        ("S30 a directory", directory(F), (F, "is a directory")),
        ("S31 a pipe", pipe(F), (F, "is not a plain file")),
    ]


def cases_of_index() -> list[tuple]:
    F = INDEX
    plain = "is not a plain .safetensors file name"
    wrong_shard = lambda said: said["weight_map"].update({"model.norm.weight": "model-00001-of-00002.safetensors"})
    return [
        ("I01", index(lambda said: said.pop("weight_map") and None), (F, "weight_map: must map tensor names")),
        ("I01b empty", index(lambda said: {"weight_map": {}}), (F, "weight_map: must map tensor names")),
        ("I01c a list", index(lambda said: {"weight_map": ["a"]}), (F, "weight_map: must map tensor names")),
        (
            "I02",
            shard_named("../outside/model.safetensors"),
            (F, "weight_map", "'../outside/model.safetensors'", plain),
        ),
        ("I03", shard_named("/abs/model.safetensors"), (F, "weight_map", "'/abs/model.safetensors'", plain)),
        ("I03b backslash", shard_named("..\\x.safetensors"), ("is not a plain",)),
        ("I03c a .bin", shard_named("pytorch_model.bin"), (F, "'pytorch_model.bin'", plain)),
        ("I03d empty", shard_named(""), (F, "weight_map", "''", plain)),
        ("I03e 5000 letters", shard_named("a" * 5000 + ".safetensors"), (F, "weight_map", plain)),
        ("I03f a folder of it", shard_named("./" + SHARD2), (F, "weight_map", plain)),
        ("I04", in_turn(index(unchanged), remove(SHARD2)), (f"no {SHARD2}", "found:")),
        ("I05", index(wrong_shard), ("tensor 'model.norm.weight'", F)),
        ("I06", index(lambda said: {"weight_map": 5}), (F, "weight_map: must map tensor names")),
        ("I06b to numbers", shard_named(3), (F, "weight_map: must map tensor names")),  # type: ignore[arg-type]
        (
            "I07",
            index(lambda said: said["metadata"].update(total_size=1)),
            (F, "metadata.total_size", "1, but the shards"),
        ),
        ("I08", shard_named("a\0.safetensors"), (F, "weight_map", plain)),
        (
            "I09",
            index(lambda said: said["weight_map"].update(foo=SHARD2)),
            ("tensor 'foo'", f"not in shard {SHARD2}", F),
        ),
        ("I10", in_turn(index(unchanged), cut(F, lambda b: b[:-9])), (F, "not valid JSON: line 1 column")),
        ("I11", link_out(SINGLE), (SINGLE, "link that leaves the model folder")),
        ("I11b a shard", in_turn(index(unchanged), link_out(SHARD2)), (SHARD2, "link that leaves the model folder")),
        ("I11c the index", in_turn(index(unchanged), link_out(F)), (F, "link that leaves the model folder")),
        (
            "I12 a shard is truncated",
            in_turn(index(unchanged), cut(SHARD2, lambda b: b[:-1])),
            (SHARD2, "data incomplete"),
        ),
    ]


CHECKPOINTS = [BadCheckpoint(*case) for case in (*cases_of_config(), *cases_of_safetensors(), *cases_of_index())]
