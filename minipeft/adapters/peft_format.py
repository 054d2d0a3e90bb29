"""Adapters on disk in Hugging Face PEFT's format, both ways: adapter_config.json + adapter_model.safetensors.

    LoRA     peft_lora.py        (IA)3    peft_ia3.py        prefix, prompt    peft_virtual.py

The config has PEFT's own keys and none of ours; what a quantized base was stands in the header of the tensors, which
PEFT does not read. Loading is strict: a missing or unexpected entry, a wrong shape, a
non-finite value or an unsupported feature is an error that names file and entry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipeft.adapters import (
    METHODS,
    AdapterReport,
    add_adapter,
    check_empty,
    describe_held,
    find_method,
    remove_adapter,
)
from minipeft.adapters.method import Method, PeftFormat
from minipeft.adapters.peft_targets import ROOT
from minipeft.adapters.peft_virtual import OWN, STATE
from minipeft.errors import InputError, check_kind, check_path, check_value, format_value
from minipeft.files import read_object, write_json
from minipeft.hub import OWNED, fetch
from minipeft.models import Decoder
from minipeft.models.checkpoint import info_of, read_legacy
from minipeft.models.quantized import find_quantization
from minipeft.tensor_files import TensorInfo, check_header, parse_header, write_tensors

CONFIG, WEIGHTS, LEGACY = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FLOATS = ("F32", "F16", "BF16", "F64")
QUANTIZED = "quantized_base"  # metadata of the tensors: nf4 or int8
# keys of every PEFT config that have no effect on a loaded adapter
SHARED = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision",
          "runtime_config", "task_type"}  # fmt: skip


def save_adapter(model: Decoder, folder: str | Path, *, baked: bool = False) -> None:
    """Write the model's adapter to `folder` as PEFT would; each file atomically.

    `baked`: a LoRA's scales stand in B where they are not alpha / r, for clients that read neither use_rslora nor
    alpha_pattern, such as llama.cpp's converter; PEFT and `load_adapter` read the same updates, to rounding.

    Raises:
        InputError: `baked` for what is not plain LoRA.
        InputError: the model holds no adapter, or was tuned in full (save_model keeps that); the folder refuses.
    """
    check_kind(model, Decoder, "model")
    folder = check_path(folder, "folder")
    config = model.adapter
    peft = next((method.peft for method in METHODS.values() if type(config) is method.config), None)
    if peft is None:
        hint = "save_model writes the whole model"
        raise InputError(f"the model holds {describe_held(model)}", where="save_adapter", hint=hint)
    check_value(baked, bool, {}, "baked")
    tensors = peft.tensors(model)
    if baked:
        if peft.bake is None:
            raise InputError(f"the model holds {describe_held(model)}, which has no scale", where="baked")
        config, tensors = peft.bake(config, tensors, model)
    given = peft.to_json(config, model)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise InputError("holds NaN or Inf, and is not saved", where=name)
    quantization = find_quantization(model)
    write_tensors(folder / WEIGHTS, tensors, {QUANTIZED: quantization} if quantization else None)
    write_json(folder / CONFIG, dict(sorted({**make_shared_json(model), **given}.items())))
    if peft.write_extra is None:  # another adapter's, in the same folder
        for name in (OWN, STATE):
            (folder / name).unlink(missing_ok=True)
    else:
        peft.write_extra(model, config, Path(folder))


def make_shared_json(model: Decoder) -> dict[str, object]:
    """Make the keys that every PEFT config has."""
    return {
        "base_model_name_or_path": model.source,
        "inference_mode": True,
        "modules_to_save": None,
        "revision": None,
        "task_type": "CAUSAL_LM",  # without it PEFT loads a prefix and never applies it
    }


def find_adapter(
    source: str | Path, revision: str | None = None, legacy_bin: bool = False, *, also: Sequence[str] = ()
) -> Path:
    """Find the folder of an adapter: a local one, else that of the hub id OWNER/NAME, downloaded with the files of
    `also` that it has.

    Raises:
        InputError: the hub refuses, lacks adapter_config.json, or cannot be reached; a local folder with a revision.
    """
    if revision is None and (Path(source).exists() or not OWNED.fullmatch(str(source))):
        return Path(source)
    return fetch(source, [CONFIG], revision=revision, optional=[WEIGHTS, OWN, STATE, *also, *[LEGACY] * legacy_bin])


def load_adapter(
    model: Decoder,
    source: str | Path,
    *,
    trainable: bool = False,
    revision: str | None = None,
    legacy_bin: bool = False,
) -> AdapterReport:
    """Put the adapter of a folder or hub id (OWNER/NAME), ours or PEFT's, into the model; frozen, unless `trainable`.

    `legacy_bin` reads adapter_model.bin (torch.load, weights_only) where there is no safetensors file.

    Raises:
        InputError: the model holds an adapter already; a file is missing or malformed; a tensor is missing, unexpected,
            wrongly shaped, not floating or not finite; the config has an unsupported setting; the hub refuses.
    """
    check_kind(model, Decoder, "model")
    check_path(source, "source")
    check_value(trainable, bool, {}, "trainable")
    check_value(legacy_bin, bool, {}, "legacy_bin")
    check_empty(model)
    folder = find_adapter(source, revision, legacy_bin)
    config, tensors, notes = read_adapter(model, folder, legacy_bin)
    peft = get_format(find_method(config))
    if peft.read_extra is not None:
        config = peft.read_extra(config, folder, trainable)
    report = add_adapter(model, peft.bare(config))  # its init is overwritten at once
    model.adapter = config
    try:
        peft.fill(model, tensors, folder)
    except InputError:
        remove_adapter(model)
        raise
    if not trainable:
        for p in model.parameters():
            p.requires_grad_(False)
        report = dataclasses.replace(report, trainable=0)
    return dataclasses.replace(report, notes=(*report.notes, *notes))


def read_adapter(
    model: Decoder, folder: Path, legacy_bin: bool = False
) -> tuple[Any, dict[str, Tensor], tuple[str, ...]]:
    """The config, the tensors under PEFT's names and the notes on the adapter in `folder`, checked against the model,
    which is not touched."""
    file = folder / WEIGHTS
    given = read_object(folder / CONFIG)
    peft = get_format(read_method(given, folder / CONFIG))
    with naming(peft, folder / CONFIG):
        config = parse_adapter_config(given)
        peft.check(given, model)
    legacy: dict[str, Tensor] = {}
    if not file.exists() and (folder / LEGACY).exists():
        if not legacy_bin:
            hint = "One that you trust is read with legacy_bin=True (command line: --legacy-bin)"
            raise InputError(f"holds only {LEGACY}, a pickle, which is not read", file=folder, hint=hint)
        file = folder / LEGACY
        legacy = read_legacy(file)
    raw, metadata = ({name: info_of(t, name, file) for name, t in legacy.items()}, {}) if legacy else parse_header(file)
    header = {name.replace(".default.", "."): info for name, info in raw.items()}  # old PEFT's, by adapter name
    if len(header) < len(raw):
        raise InputError("a tensor is there twice, with and without '.default.'", file=file)
    header = peft.rename(header, model)
    with naming(peft, folder / CONFIG):
        config, notes = peft.fit(config, given, model, header)
        wanted = peft.shapes(model, config)
        optional = peft.optional(model, config, given, header)
    if not header.keys() & wanted.keys():
        first = next(iter(raw), None)
        raise InputError(
            f"no adapter tensors recognised; the first is {first!r}, want {next(iter(wanted))!r}", file=file
        )
    check_vocabulary(header, wanted, model, file)
    hint = "Is the adapter for another model?"
    check_header(header, wanted | optional, file, dtypes=FLOATS, optional=optional, hint=hint)
    notes += [*list_notes(given, peft), *compare_bases(given, metadata, model)]
    if any(info.dtype == "F64" for info in raw.values()):
        notes.append("float64 in the file, float32 here")
    return config, peft.settle(given, read_finite(file, header, legacy), model, file), tuple(notes)


def compare_bases(given: Mapping[str, Any], metadata: Mapping[str, str], model: Decoder) -> Iterator[str]:
    """Notes where the adapter was trained on another base than `model`, by name or by quantization."""
    base = given.get("base_model_name_or_path")
    if base and model.source and Path(str(base)).name != Path(model.source).name:
        yield f"trained on {base}, loaded on {model.source}"
    trained_on, loaded_on = metadata.get(QUANTIZED), find_quantization(model)
    if trained_on not in (None, loaded_on):
        yield f"trained on a base in {format_value(trained_on)}, loaded on one in {loaded_on or 'full precision'}"


@contextmanager
def naming(peft: PeftFormat, file: Path) -> Iterator[None]:
    """Context manager: errors name the file, and PEFT's key for our field."""
    try:
        yield
    except InputError as error:
        name, separator, problem = str(error).partition(": ")
        raise InputError(peft.fields.get(name, name) + separator + problem, file=file) from error


def check_vocabulary(
    header: Mapping[str, TensorInfo], wanted: Mapping[str, tuple[int, ...]], model: Decoder, file: Path
) -> None:
    """Explain an embedding or head of another length in the file: a resized vocabulary.

    Raises:
        InputError: there is one.
    """
    for part in (model.family.embedding, "lm_head"):
        for name in (f"{ROOT}{part}.weight", f"{ROOT}{part}.base_layer.weight"):
            rows = header[name].shape[0] if name in header and header[name].shape else model.config.vocab_size
            if name not in wanted and rows != model.config.vocab_size:
                problem = f"the vocabulary was resized: {name!r} has {rows} rows, the model {model.config.vocab_size}"
                hint = "Merge the adapter into its own base with PEFT, and load that"
                raise InputError(problem, file=file, hint=hint)


def list_notes(given: Mapping[str, Any], peft: PeftFormat) -> list[str]:
    """List a note on each entry of adapter_config.json that is set and has no effect on a loaded adapter."""
    return [
        f"{key}: {format_value(value)} has no effect on a loaded adapter"
        for key, value in given.items()
        if key in peft.noted and value not in (None, False, {}, []) and value not in peft.neutral.get(key, ())
    ]


def read_method(given: Mapping[str, Any], file: Path | None = None) -> Method:
    """Read the method of an adapter_config.json.

    Raises:
        InputError: its peft_type is not one of ours.
    """
    kind = given.get("peft_type")
    known = {name: method for method in METHODS.values() if method.peft is not None for name in method.peft.types}
    if not isinstance(kind, str) or kind not in known:
        raise InputError(f"{kind!r} is not supported ({', '.join(known)})", file=file, where="peft_type")
    return known[kind]


def get_format(method: Method) -> PeftFormat:
    """Get a method's format, which it must have."""
    assert method.peft is not None
    return method.peft


def parse_adapter_config(given: Mapping[str, Any]) -> Any:
    """Parse adapter_config.json into our config.

    Raises:
        InputError: it has an unsupported setting, or a key that is not PEFT's.
    """
    peft = get_format(read_method(given))
    for key, value in given.items():
        if key in peft.noted and (peft.noted[key] is None or value in (peft.noted[key] or ())):
            continue
        if key in peft.neutral:
            if value not in peft.neutral[key]:
                raise InputError(f"{value!r} is not supported", where=key)
        elif key not in peft.known | SHARED and value not in (None, False, {}, []):
            raise InputError(f"unknown field with value {value!r}", where=key)
    return peft.from_json(given)


def read_finite(
    file: Path, header: Mapping[str, TensorInfo], legacy: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors in float32, copied out of the file (which may be rewritten while it is mapped), all finite; `legacy`
    holds those of a pickle.

    Raises:
        InputError: a tensor is not finite.
    """
    from safetensors import safe_open

    tensors = {}
    with nullcontext() if legacy else safe_open(file, framework="pt") as stored:
        for name, info in header.items():
            held = legacy[info.name] if legacy else stored.get_tensor(info.name)  # type: ignore[union-attr]
            tensors[name] = held.to(torch.float32, copy=True)
            if not torch.isfinite(tensors[name]).all():
                raise InputError("holds NaN or Inf", file=file, where=f"tensor {info.name!r}")
    return tensors
