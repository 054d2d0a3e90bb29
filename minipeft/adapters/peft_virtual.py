"""What a prefix or prompt needs to go on training, and PEFT's two files cannot hold: two more, which PEFT never reads.

    minipeft_adapter.json         the config: how the columns started, whether a sliding window hides them, ...
    minipeft_state.safetensors    the network that makes the columns and its fixed start; with `reparam` only

PEFT's files hold the columns with the network folded in, so that whoever only uses the adapter needs nothing else.
Without these two files the adapter is PEFT's: a plain table, hidden by a sliding window as PEFT's is.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from minipeft.adapters.prefix import GatedPrefix, Prefix, PrefixConfig, prefixes
from minipeft.adapters.prompt import Prompt, PromptConfig
from minipeft.errors import InputError
from minipeft.files import read_header, read_object, write_json, write_tensors
from minipeft.models import Decoder

GATED = "GATED_PREFIX_TUNING"  # adapter_config's peft_type: PEFT must refuse a gated prefix, not apply it ungated
OWN, STATE = "minipeft_adapter.json", "minipeft_state.safetensors"
ROUNDING = 1e-4  # between the stored columns and those that the network makes: another machine's products differ

Learned = PrefixConfig | PromptConfig


def write_own(model: Decoder, config: object, folder: Path) -> None:
    """Write what a prefix or prompt needs beside PEFT's files; of any other adapter only clear such files away."""
    virtual_tokens = config if isinstance(config, PrefixConfig | PromptConfig) else None
    if virtual_tokens is not None and virtual_tokens.reparam is not None:
        write_tensors(folder / STATE, state_of(model))
    else:
        (folder / STATE).unlink(missing_ok=True)  # an older adapter's, in the same folder
    if virtual_tokens is not None:
        write_json(folder / OWN, dataclasses.asdict(virtual_tokens))
    else:
        (folder / OWN).unlink(missing_ok=True)


def state_of(model: Decoder) -> dict[str, Tensor]:
    """Every tensor of the model's prefix or prompt, trained or fixed, by its path in the model; a shared one once."""
    kinds = GatedPrefix | Prefix | Prompt
    sites = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    found: dict[int, tuple[str, Tensor]] = {}
    for path, site in sites:
        for name, tensor in (*site.named_parameters(), *site.named_buffers()):
            found.setdefault(id(tensor), (f"{path}.{name}", tensor))
    return {name: tensor.detach() for name, tensor in found.values()}


def with_own(config: Learned, folder: Path, *, trainable: bool) -> Learned:
    """The config as PEFT's file tells it -> with what ours adds; without `trainable` the columns are a plain table.

    Raises:
        InputError: our file is not of this adapter, or the network is asked for and is not there.
    """
    file = folder / OWN
    if not file.exists():
        return dataclasses.replace(config, windowed=not getattr(config, "gate", False))
    given = read_object(file)
    fields = {field.name for field in dataclasses.fields(config)}
    if unknown := [name for name in given if name not in fields]:
        raise InputError(f"unknown field {unknown[0]!r}", file=file)
    try:
        own = type(config)(**given)
    except (InputError, TypeError) as error:
        raise InputError(str(error), file=file) from error
    for name in ("length", "gate"):
        if getattr(own, name, None) != getattr(config, name, None):
            said = f"{getattr(own, name)!r}, but adapter_config.json says {getattr(config, name)!r}"
            raise InputError(
                said, file=file, where=name, hint=f"Delete {OWN} and {STATE} if they are another adapter's"
            )
    if not trainable:
        return dataclasses.replace(own, reparam=None)
    if own.reparam is not None and not (folder / STATE).exists():
        hint = f"Load it without trainable, or set reparam to null in {OWN} to train the table alone"
        raise InputError(f"asks for the network of width {own.reparam}, but {STATE} is missing", file=file, hint=hint)
    return own


def fill_state(model: Decoder, folder: Path, table: Tensor) -> None:
    """Copy the network and its start into the model, and hold its columns against the stored ones (`table`).

    Raises:
        InputError: a tensor is missing, unexpected, of another shape or not finite, or makes other columns.
    """
    from safetensors import safe_open

    file, wanted = folder / STATE, state_of(model)
    header = read_header(file)
    if odd := sorted(set(header) ^ set(wanted)):
        fault = "is missing" if odd[0] in wanted else "is not used"
        raise InputError(f"{fault} ({len(odd)} such tensors)", file=file, where=f"tensor {odd[0]!r}")
    with safe_open(file, framework="pt") as opened:
        for name, tensor in wanted.items():
            where = f"tensor {name!r}"
            if header[name].shape != tuple(tensor.shape) or header[name].dtype != "F32":
                found = f"{header[name].dtype} {list(header[name].shape)}"
                raise InputError(f"{found}, want F32 {list(tensor.shape)}", file=file, where=where)
            given = opened.get_tensor(name)
            if not torch.isfinite(given).all():
                raise InputError("holds NaN or Inf", file=file, where=where)
            tensor.copy_(given)
    made = columns_of(model).to(table.device)
    apart = float((made - table).abs().max() / table.abs().max().clamp(min=1e-6))
    if apart > ROUNDING:
        raise InputError(
            f"makes other columns than adapter_model.safetensors holds (by {apart:.1e} of the largest)",
            file=file,
            hint=f"Delete {OWN} and {STATE} to go by the stored columns",
        )


def columns_of(model: Decoder) -> Tensor:
    """All learned columns as PEFT's one table, a network folded in: a prompt's [P, C], a prefix's [P, L * 2 * K * D]"""
    if model.prompt is not None:
        return model.prompt.columns().detach()
    layers = [torch.stack(prefix.columns()) for prefix in prefixes(model)]  # each [2, K, P, D]
    return torch.stack(layers).permute(3, 0, 1, 2, 4).flatten(1).detach()
