"""What a training run starts from: data, tokenizer, the model with its adapter, and the packed rows.

Where several processes shard the base's weights, rank 0 alone loads them (training/sharding.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from minipeft.adapters import AdapterReport, add_adapter
from minipeft.data.chat import ChatTemplate, load_chat_template
from minipeft.data.encoded import Encoded
from minipeft.data.forms import CHAT, DataFormat, open_data
from minipeft.data.packing import Batch, Batches, PackConfig, pack
from minipeft.data.streaming import EncodedData, encode_stream
from minipeft.data.token_file import load_encoded
from minipeft.data.tokens import Tokenizer, load_tokenizer
from minipeft.errors import InputError
from minipeft.hub import fetch
from minipeft.models import Decoder
from minipeft.models.checkpoint import load_model, read_config
from minipeft.runs.config import DTYPES, DataConfig, ModelConfig, RunConfig
from minipeft.runs.estimates import choose_row_length
from minipeft.runs.planning import adapt_on_meta
from minipeft.training.loop import TrainConfig
from minipeft.training.processes import Processes

HELD_OUT_LENGTH = 1024  # tokens of a row of held-out pairs
LONG_ENCODING = 10.0  # seconds, after which a run names --token-cache

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """The encoded data of a run, the model's tokenizer and, for chats, its chat template."""

    data: EncodedData
    tokenizer: Tokenizer
    chat: ChatTemplate | None

    @property
    def format(self) -> DataFormat:
        """Form and template, as the adapter's folder keeps them."""
        return self.data.format if self.chat is None else DataFormat(CHAT, self.chat.text)


def prepare(model: ModelConfig, given: DataConfig) -> Prepared:
    """Read the tokenizer and, for chats, the chat template, and read and encode the data.

    Raises:
        InputError: one of them cannot be read; a row cannot be encoded.
    """
    stream = open_data(given.source, template=given.template, file=given.file, revision=given.revision)
    chat = load_chat_template(model.source, revision=model.revision) if stream.format.form == CHAT else None
    tokenizer = load_tokens(model)
    if given.token_cache is not None:
        return Prepared(load_encoded(stream, tokenizer, Path(given.token_cache), chat), tokenizer, chat)
    begin = time.monotonic()
    data = encode_stream(stream, tokenizer, chat)
    if (seconds := time.monotonic() - begin) > LONG_ENCODING:
        note = f"encoding took {seconds:.0f} s; --token-cache FOLDER keeps the tokens for the next run"
        data = replace(data, notes=(*data.notes, note))
    return Prepared(data, tokenizer, chat)


def load_tokens(model: ModelConfig) -> Tokenizer:
    """The tokenizer of a model."""
    tokenizer = load_tokenizer(model.source, revision=model.revision)
    return tokenizer if model.eos_token is None else tokenizer.with_eos(model.eos_token)


def load_base(config: RunConfig) -> Decoder:
    """Load the model to train; full tuning loads float32 weights, unless --dtype says otherwise."""
    given = config.model
    return load_given(given, torch.float32 if config.method.trains_base and not given.dtype else None)


def load_given(given: ModelConfig, dtype: torch.dtype | None = None) -> Decoder:
    """Load a model as its config says. `dtype` holds where the config names none; None is the file's own."""
    return load_model(
        given.source,
        dtype=DTYPES[given.dtype] if given.dtype else dtype,
        device=given.device,
        revision=given.revision,
        legacy_bin=given.legacy_bin,
        quantize=given.quantize,
    )


def in_host_memory(config: RunConfig) -> RunConfig:
    """The config with a model that is loaded into host memory."""
    return replace(config, model=replace(config.model, device="cpu"))


def check_sharding(config: RunConfig, processes: Processes) -> None:
    """Check that the base can be sharded, before it is loaded.

    Raises:
        InputError: it is quantized, or trained in bfloat16.
    """
    if processes.shards and config.method.trains_base and config.model.dtype == "bf16":
        raise InputError("weights that are sharded and trained must be fp32", where="shard", hint="Give --dtype fp32")
    if processes.shards and config.model.quantize is not None:
        problem = f"the codes and scales of a base in {config.model.quantize} cannot be sharded"
        raise InputError(problem, where="shard", hint="Give --shard or --quantize: both save memory")


def load_adapted(config: RunConfig, tokenizer: Tokenizer, processes: Processes) -> tuple[Decoder, AdapterReport]:
    """Load the model and add the adapter; of sharded weights rank 0 alone, and the others build both without values.

    Raises:
        InputError: the tokenizer has ids beyond the vocabulary, which the adapter may have resized.
    """
    given, found = config.model, list[tuple[Decoder, AdapterReport]]()

    def load() -> str:
        model = load_base(in_host_memory(config) if processes.shards else config)
        report = add_adapter(model, config.adapter, tokenizer, seed=config.train.seed)
        tokenizer.check_fits(model.config.vocab_size, given.source)
        found.append((model, report))
        return str(model.embedding.weight.dtype).removeprefix("torch.")

    dtype = processes.lead(load) if processes.shards else load()
    if not found:
        base = read_config(fetch(given.source, ["config.json"], revision=given.revision) / "config.json")
        found.append(adapt_on_meta(base, config.adapter, getattr(torch, dtype)))
    model, report = found[0]
    return model.eval(), report


def load_whole(config: RunConfig, whole: Mapping[str, Tensor]) -> Decoder:
    """The tuned model in host memory, from its whole weights."""
    model = load_base(in_host_memory(config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(whole[name])
    return model


def pack_data(config: RunConfig, model: Decoder, prepared: Prepared, say: Say) -> tuple[Batches, list[Batch]]:
    """The batches to train on, and those held out."""
    wanted, packing, data = config.data.held_out, config.packing, prepared.data
    kept, held_out, shared = data.hold_out(wanted)
    if shared:
        found = f"{shared} of the {len(held_out)} {data.format.noun} held out are also trained on"
        say(f"warning: {found}: the held-out loss is too low")
    batches = pack(
        kept,
        prepared.tokenizer,
        length=choose_row_length(packing, model),
        batch=packing.batch,
        virtual_tokens=model.virtual_tokens,
        seed=config.train.seed,
        loss_mask=packing.loss_mask,
        isolate=packing.isolate,
    )
    return batches, pack_held_out(packing, model, prepared.tokenizer, held_out) if wanted else []


def pack_held_out(packing: PackConfig, model: Decoder, tokenizer: Tokenizer, held_out: Encoded) -> list[Batch]:
    """Pack the held-out examples into isolated rows, so that packing does not change the loss; the same for every seed.
    The row length does not depend on the training rows', so that one is cut only if it exceeds HELD_OUT_LENGTH."""
    rows = pack(
        held_out,
        tokenizer,
        length=min(HELD_OUT_LENGTH, model.config.context),
        batch=1,
        virtual_tokens=model.virtual_tokens,
        loss_mask=packing.loss_mask,
        shuffle=False,
    )
    return list(rows)


def set_steps(config: RunConfig, batches: int) -> TrainConfig:
    """Set the number of training steps from the epochs, if the config gives none."""
    if config.train.steps is not None:
        return config.train
    return replace(config.train, steps=max(1, round(config.epochs * batches / config.train.accumulate)))
