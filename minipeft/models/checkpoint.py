"""Load and save a decoder in Hugging Face's layout: single or sharded safetensors, strictly, no pickle by default.

Loading goes   config.json -> names, shapes and dtypes in all files' headers -> compare with the decoder, built on the
meta device (nothing allocated) -> only then read the tensors. What is missing, unexpected, of another shape or not
finite is an error that names file and tensor, never a warning. Module names are Hugging Face's own, so keys need no
map; a family's record lists the exceptions (transposed weights, an omitted prefix, buffers):

    wte.weight ...                        GPT-2 files that omit `transformer.` from every name but the head's
    h.0.attn.bias, h.0.attn.masked_bias   masks stored as buffers in old files, and rotary_emb.inv_freq: ignored
    lm_head.weight beside a tied table    must equal the table
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from pickle import UnpicklingError  # for its exception only: torch's weights_only reader does all unpickling
from typing import Any, Protocol

import torch
from torch import Tensor

from minipeft.errors import InputError, check_kind, check_path, check_value, format_value, has_type
from minipeft.files import check_inside, hash_file, read_object, write_json
from minipeft.hub import fetch, list_names, read_commit
from minipeft.models import FAMILIES, REFUSED, Decoder, Family
from minipeft.models.config import parse_config
from minipeft.models.decoder import check_process
from minipeft.models.quantize import check_format
from minipeft.models.quantized import find_quantizable, is_quantized, quantize_weight
from minipeft.tensor_files import TensorInfo, check_header, read_header, write_tensors

SINGLE, INDEX, LEGACY = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
GENERATION = "generation_config.json"
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DAMAGED = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError, EOFError, OSError,
           UnpicklingError, struct.error, zipfile.BadZipFile)  # fmt: skip  # what torch.load says of a damaged file

Found = dict[str, TensorInfo]  # by our name; a TensorInfo holds the file and the name in it


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    legacy_bin: bool = False,
    quantize: str | None = None,
) -> Decoder:
    """Load a checkpoint of one of FAMILIES from a folder or hub id, in eval mode.

    `dtype` None keeps the file's own. `legacy_bin` reads pytorch_model.bin (torch.load, weights_only) where there is no
    safetensors file. `quantize` ("nf4", "int8") holds the linears of the blocks in 4 or 8 bits (quantize.py); they
    are quantized one by one, so that at most one file's weights are in memory unquantized.

    Raises:
        InputError: anything missing, unexpected, wrongly shaped, not finite, or not supported; names file and tensor.
    """
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"{dtype} is not a dtype for weights (float32, bfloat16, float16)", where="dtype")
    check_value(legacy_bin, bool, {}, "legacy_bin")
    check_process()
    device = check_device(device)
    if quantize is not None:
        check_format(quantize)
    folder = fetch(source, ["config.json"], revision=revision, optional=[SINGLE, INDEX, GENERATION])
    held = [name for name in ("config.json", SINGLE, INDEX, GENERATION) if (folder / name).exists()]
    for name in held:
        check_inside(folder / name, folder)
    config = read_config(folder / "config.json")
    if GENERATION in held:
        config = add_end_tokens(config, folder / GENERATION)
    weights = folder / next((name for name in (SINGLE, INDEX) if name in held), LEGACY)
    legacy: dict[str, Tensor] = {}
    if weights.name in held:
        found = find_tensors(folder, source, revision)
    else:
        legacy = fetch_legacy(folder, source, revision, legacy_bin)
        found = {name: info_of(t, name, weights) for name, t in legacy.items()}
    family = FAMILIES[config.model_type]
    found = rename_tensors(found, family)
    check_layers(found, config, folder / "config.json", weights)
    model: Decoder = family.build_empty(config)
    check_tensors(found, model, weights)
    files = (
        [{name: legacy[info.name] for name, info in found.items()}]
        if legacy
        else read_files(found, apart=quantize is not None)
    )
    model.source = str(source)
    return fill(model, files, found, dtype or find_stored_dtype(found), device, quantize)


def check_device(device: Any) -> torch.device:
    """Return the device of that name.

    Raises:
        InputError: there is no such device, or it cannot hold tensors.
    """
    if not isinstance(device, torch.device):
        check_value(device, str, {}, "device")
    try:
        made = torch.device(device)
        torch.zeros(1, device=made).item()  # "meta" has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"{str(device)!r} cannot be used: {str(error).splitlines()[0]}", where="device") from error
    return made


def read_config(file: Path) -> Any:
    """The config dataclass of a family, from config.json."""
    given = read_object(file)
    kind = given.get("model_type")
    if isinstance(kind, str) and kind in REFUSED:
        raise InputError(f"{kind!r} is not supported: {REFUSED[kind]}", file=file, where="model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise InputError(f"{kind!r} is not supported ({', '.join(FAMILIES)})", file=file, where="model_type")
    try:
        return parse_config(FAMILIES[kind].config, given)
    except InputError as error:
        raise InputError(str(error), file=file) from error


def add_end_tokens(config: Any, file: Path) -> Any:
    """Add the EOS ids of generation_config.json to the config: a chat model of Llama 3 or Gemma ends its turn with a
    token that config.json does not name.

    Raises:
        InputError: eos_token_id is neither an id nor a list of ids.
    """
    given = read_object(file).get("eos_token_id")
    if given is None:
        return config
    added = given if isinstance(given, list) else [given]
    if any(not has_type(token, int) or token < 0 for token in added):
        raise InputError(f"{format_value(given)} must be an id or a list of ids", file=file, where="eos_token_id")
    held = config.eos_token_id
    own = held if isinstance(held, tuple) else () if held is None else (held,)
    return config if set(added) <= set(own) else replace(config, eos_token_id=tuple(dict.fromkeys([*own, *added])))


def find_tensors(folder: Path, source: str | Path, revision: str | None) -> Found:
    """Read the headers of the single file, or of all shards in the index; every tensor by its name in the files."""
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    index = read_object(folder / INDEX)
    weight_map = index.get("weight_map")
    texts = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
    if not weight_map or not texts:
        raise InputError("must map tensor names to file names", file=folder / INDEX, where="weight_map")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        plain = shard == Path(shard).name and shard.isprintable() and len(shard) <= 200
        if not plain or not shard.endswith(".safetensors"):
            problem = f"{shard[:200]!r} is not a plain .safetensors file name"
            raise InputError(problem, file=folder / INDEX, where="weight_map")
    folder = fetch(source, ["config.json", INDEX, *shards], revision=pin(source, folder, revision))
    found: Found = {}
    for shard in shards:
        check_inside(folder / shard, folder)
        for name, info in read_header(folder / shard).items():
            if weight_map.get(name) != shard:
                raise InputError(f"not listed there in {INDEX}", file=folder / shard, where=f"tensor {name!r}")
            found[name] = info
    for name, shard in weight_map.items():
        if name not in found:
            raise InputError(f"not in shard {shard}, where {INDEX} puts it", file=folder, where=f"tensor {name!r}")
    metadata, held = index.get("metadata"), sum(info.stop - info.start for info in found.values())
    if isinstance(metadata, dict) and metadata.get("total_size", held) != held:
        problem = f"{metadata['total_size']!r}, but the shards hold {held} bytes"
        raise InputError(problem, file=folder / INDEX, where="metadata.total_size")
    return found


def pin(source: str | Path, folder: Path, revision: str | None) -> str | None:
    """The revision for fetching further files, so that all come from the commit of `folder`; None if it is local."""
    return None if Path(source).is_dir() else read_commit(folder) or revision


def rename_tensors(found: Found, family: Family) -> Found:
    """Rename the tensors to our names: buffers are dropped, and a prefix that the files omit is added."""
    named = {family.renamed.get(name, name): info for name, info in found.items()}
    kept = {name: info for name, info in named.items() if not (family.buffers and name.endswith(family.buffers))}
    prefix = family.optional_prefix
    if prefix and f"{family.embedding}.weight".removeprefix(prefix) in kept:
        kept = {name if name.startswith("lm_head.") else prefix + name: info for name, info in kept.items()}
    return kept


def check_layers(found: Found, config: Any, config_file: Path, weights: Path) -> None:
    """Compare the config's number of layers with the weights', before a decoder of that many layers is built."""
    family = FAMILIES[config.model_type]
    stem = family.blocks
    layers = {name.removeprefix(f"{stem}.").split(".")[0] for name in found if name.startswith(f"{stem}.")}
    if not layers:
        begins = f"the first of {len(found)} is {min(found)!r}" if found else "it holds none"
        raise InputError(f"no tensor '{stem}.0. ...' ({begins}): not a {config.model_type} checkpoint?", file=weights)
    if len(layers) != config.layers:
        raise InputError(
            f"{config.layers}, but the weights hold {len(layers)}", file=config_file, where=family.layers_field
        )


def check_tensors(found: Found, model: Decoder, weights: Path) -> None:
    """Check tensor names, shapes and dtypes against the model.

    Raises:
        InputError: a tensor is missing, unexpected, of another shape, or not of a floating dtype.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    wanted = {name: shape[::-1] if is_transposed(name, model) else shape for name, shape in shapes.items()}
    tied = model.config.tie_word_embeddings
    if not tied and [name for name in wanted if name not in found] == ["lm_head.weight"]:
        raise InputError("tie_word_embeddings is false, but lm_head.weight is missing", file=weights)
    hint = "Do the weights belong to this config.json (vocab_size, widths)?"
    check_header(found, wanted, weights, optional=("lm_head.weight",) if tied else (), hint=hint)


def is_transposed(name: str, model: Decoder) -> bool:
    """Whether the files hold this weight as [in, out]."""
    return bool(model.family.transposed) and name.endswith(model.family.transposed)


def read_files(found: Found, apart: bool = False) -> Iterator[dict[str, Tensor]]:
    """Read the tensors file by file; they are memory-mapped, and copied only when they are changed.

    `apart`: one at a time, each in a mapping of its own, whose pages are freed with it; a file's one mapping keeps all
    pages that were read as long as any of its tensors lives.
    """
    from safetensors import SafetensorError, safe_open

    for file in sorted({info.file for info in found.values()}):
        names = [name for name, info in found.items() if info.file == file]
        for some in [[name] for name in names] if apart else [names]:
            try:
                with safe_open(file, framework="pt") as opened:
                    yield {name: opened.get_tensor(found[name].name) for name in some}
            except SafetensorError as error:  # a fault that read_header does not find
                raise InputError(f"not safetensors: {error}", file=file) from error


def fetch_legacy(folder: Path, source: str | Path, revision: str | None, allowed: bool) -> dict[str, Tensor]:
    """Read the tensors of pytorch_model.bin, where the caller allows it."""
    if not allowed:
        held = f"found: {list_names(folder)}"
        raise InputError(
            f"no {SINGLE} and no {INDEX} ({held}); pickle is not read by default",
            file=folder,
            hint=f"A {LEGACY} that you trust is read with legacy_bin=True (command line: --legacy-bin)",
        )
    return read_legacy(fetch(source, [LEGACY], revision=pin(source, folder, revision)) / LEGACY)


def read_legacy(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote: the one place where torch.load stands, with weights_only=True.

    Raises:
        InputError: the file is damaged, or holds something other than names and tensors.
    """
    check_inside(file, file.parent)
    try:  # torch before 1.6 wrote no zip file, and only a zip file can be mapped
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except DAMAGED as error:
        problem = f"cannot be read as weights: damaged, or holds more than tensors ({type(error).__name__})"
        raise InputError(problem, file=file) from error
    plain = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not plain or not all(isinstance(t, Tensor) and t.layout == torch.strided for t in tensors.values()):
        raise InputError("must hold names and tensors, nothing else", file=file)
    return tensors


def info_of(tensor: Tensor, name: str, file: Path) -> TensorInfo:
    """Describe a loaded tensor as a header entry, so that both file formats pass the same checks."""
    names = {dtype: name for name, dtype in FLOATS.items()}
    return TensorInfo(file, name, names.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), 0, 0)


def find_stored_dtype(found: Found) -> torch.dtype:
    """The dtype of all tensors in the files; float32 for mixed files, because it represents float16 and bfloat16."""
    kinds = {info.dtype for info in found.values()}
    return FLOATS[kinds.pop()] if len(kinds) == 1 else torch.float32


def fill(
    model: Decoder,
    files: Iterable[dict[str, Tensor]],
    found: Found,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None = None,
) -> Decoder:
    """Fill the meta model file by file: check that tensors are finite, transpose, cast, quantize; tie the head."""
    packed = {f"{path}.weight" for path in find_quantizable(model)} if quantize is not None else set()
    ready: dict[str, Tensor] = {}
    for tensors in files:
        for name in list(tensors):
            tensor = read = tensors.pop(name)
            file, where = found[name].file, f"tensor {found[name].name!r}"
            if not is_finite(read):
                bad = int((~torch.isfinite(read)).sum())
                raise InputError(f"holds NaN or Inf ({bad} of {read.numel()} values)", file=file, where=where)
            tensor = (read.T.contiguous() if is_transposed(name, model) else read).to(device, dtype)
            if dtype == torch.float16 != read.dtype and not is_finite(tensor):
                raise InputError("holds values beyond float16's 65504", file=file, where=where)
            ready[name] = quantize_weight(tensor, quantize) if quantize is not None and name in packed else tensor
            del tensor, read  # before the next one is read
            if quantize is not None:
                return_freed_memory()
    if model.config.tie_word_embeddings:
        table = ready[f"{model.family.embedding}.weight"]
        head = ready.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, table):
            problem = "differs from the embedding that config.json ties it to"
            raise InputError(problem, file=found["lm_head.weight"].file, where="tensor 'lm_head.weight'")
        ready["lm_head.weight"] = table
    model.load_state_dict(ready, assign=True)
    for path in packed:
        model.get_parameter(path).requires_grad_(False)
    model.tie()
    return model.eval()


def return_freed_memory() -> None:
    """Return freed memory to the system: glibc keeps the holes between tensors that stay, 600 MB of a 1B model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or Inf: the least or the largest value would be."""
    return all(bool(torch.isfinite(bound)) for bound in torch.aminmax(tensor))


def fingerprint(source: str | Path, revision: str | None = None) -> str:
    """The sha256 of a checkpoint: config.json and every byte of each weight file (about a second per GB).

    A file is hashed once per process while its size, time and inode stay the same. A hub's commit replaces its files.
    """
    folder = fetch(source, ["config.json"], revision=revision)
    check_inside(folder / "config.json", folder)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    if (
        commit := read_commit(folder)
    ) is not None:  # a commit on the hub never changes; the set of downloaded files may
        return hashlib.sha256(digest.digest() + commit.encode()).hexdigest()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob(LEGACY)]):
        check_inside(file, folder)
        stat = file.stat()
        digest.update(
            f"{file.name} {hash_version(file.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ino)}".encode()
        )
    return digest.hexdigest()


@cache
def hash_version(file: Path, size: int, changed: int, inode: int) -> str:
    """The sha256 of a file; `size`, `changed` (nanoseconds) and `inode` are the cache key."""
    return hash_file(file)


class Saved(Protocol):
    """The methods of a tokenizer that `save_model` calls."""

    def check_fits(self, vocab_size: int) -> None: ...
    def save(self, folder: Path) -> None: ...


def save_model(
    model: Decoder, folder: str | Path, tokenizer: Saved | None = None, shard_bytes: int | None = None
) -> None:
    """Write config.json and model.safetensors in Hugging Face's layout, readable by transformers.

    `shard_bytes`: write several files of at most so many bytes (a larger tensor has its own), and their index.

    With `tokenizer` its files are saved too, and the folder is complete: `minipeft generate --model FOLDER`.

    Raises:
        InputError: the model holds an adapter or quantized weights, a tensor is not finite, the tokenizer has ids
            beyond the model's vocabulary, or the folder cannot be written.
    """
    check_kind(model, Decoder, "model")
    folder = check_path(folder, "folder")
    config = model.config
    if is_quantized(model):
        hint = "dequantize_model(model) first; save_adapter keeps what was trained"
        raise InputError("the model holds quantized weights", where="save_model", hint=hint)
    plain = set(model.family.build_empty(config).state_dict())
    state = model.state_dict()
    if extra := sorted(set(state) - plain):
        raise InputError(
            f"the model holds an adapter ({extra[0]}, ...)",
            where="save_model",
            hint="merge_adapter or remove_adapter first; save_adapter keeps it by itself",
        )
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    for name, t in state.items():
        if not is_finite(t):
            raise InputError("holds NaN or Inf, and is not saved", where=name)
    tensors = {name: t.T if is_transposed(name, model) else t for name, t in state.items()}
    if tokenizer is not None:
        tokenizer.check_fits(config.vocab_size)
        tokenizer.save(folder)
    if shard_bytes is None:
        write_tensors(folder / SINGLE, tensors)
    else:
        check_value(shard_bytes, int, {"least": 1}, "shard_bytes")
        write_shards(folder, tensors, shard_bytes)
    write_json(folder / "config.json", make_config_json(config, model.embedding.weight.dtype))


def write_shards(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    """Write tensors, in their order, to files of at most `shard_bytes`, and last the index of who holds what.

    Raises:
        InputError: the folder holds a single file of weights, which readers prefer to an index.
    """
    if (folder / SINGLE).exists():
        raise InputError("is there already, and would be read instead of the new files", file=folder / SINGLE,
                         hint="Remove it, or name another folder")  # fmt: skip
    shards: list[dict[str, Tensor]] = [{}]
    held = 0
    for name, t in tensors.items():
        if shards[-1] and held + t.nbytes > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = t
        held += t.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def make_config_json(config: Any, dtype: torch.dtype) -> Mapping[str, object]:
    """Build a decoder's config.json."""
    name = str(dtype).removeprefix("torch.")
    return {
        "model_type": config.model_type,
        "architectures": [config.architecture],
        "dtype": name,
        "torch_dtype": name,
        **config.to_json(),
    }
