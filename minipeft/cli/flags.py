"""Flags from config dataclasses: one for each field, and back. `--max-new-tokens` is `max_new_tokens`."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from typing import Any

TRAIN_HELP = {
    "model": "folder or hub id of a GPT-2, Llama or Mistral checkpoint",
    "data": "conala, demo, or a file of pairs (JSON array or JSON lines with intent and snippet)",
    "method": "full, lora, prefix or prompt",
    "steps": "optimizer steps, instead of --epochs",
    "epochs": "passes over the data",
    "batch": "rows of --length tokens at a time",
    "accumulate": "batches a step",
    "length": "tokens of a row; default 1024, or the model's context",
    "learning_rate": "peak rate; default the method's own",
    "loss_mask": "which tokens are supervised: all or response",
    "isolate": "keep the documents of a row from seeing each other",
    "held_out": "pairs kept for evaluation, by question",
    "evaluate_every": "steps between evaluations; default once an epoch",
    "save_every": "steps between checkpoints",
    "seed": "of everything that is drawn",
    "dtype": "of the base: fp32 or bf16; default its own (fp32 where it is trained)",
    "device": "cpu, cuda, ...",
    "rank": "LoRA's r",
    "alpha": "LoRA's alpha; the update is scaled by alpha / rank",
    "dropout": "of LoRA's input",
    "targets": "LoRA's linears: all-linear, default, or names with commas between",
    "columns": "length of a prefix or prompt",
    "init": "start of a prefix or prompt: text, normal, peft (prefix), vocab (prompt)",
    "text": "what a prefix or prompt starts as",
    "reparam": "width of the network that makes a prefix or prompt while it trains (Li & Liang); default none",
    "deterministic": "on CUDA: the same bits each time, slower (a CPU gives them anyway)",
    "activation_checkpointing": "recompute activations: less memory, more time",
    "legacy_bin": "read pytorch_model.bin where there are no safetensors",
    "eos_token": "the token that ends a text, where the tokenizer names none",
    "revision": "commit, tag or branch on the hub",
}
GENERATE_HELP = {
    "max_new_tokens": "tokens of an answer at most",
    "temperature": "0 is greedy",
    "top_p": "share of probability that is drawn from",
    "seed": "of the draws",
    "stop": "a text that ends an answer (may be given more than once)",
    "batch": "prompts at a time",
}


def add_fields(
    parser: argparse.ArgumentParser, config: type, helps: dict[str, str], skip: tuple[str, ...] = ()
) -> None:
    """One flag for each field of a config dataclass: `--max-new-tokens` for max_new_tokens, `--no-isolate` for True."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if field.name in skip:
            continue
        flag, kind = "--" + field.name.replace("_", "-"), hints[field.name]
        if isinstance(kind, types.UnionType):
            kind = typing.get_args(kind)[0]
        said = helps.get(field.name, "")
        required = field.default is dataclasses.MISSING
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=said)
        elif typing.get_origin(kind) is tuple:
            parser.add_argument(flag, action="append", default=[], metavar="TEXT", help=said)
        else:
            shown = "" if required or field.default is None else f" (default {field.default})"
            parser.add_argument(
                flag,
                type=kind,
                required=required,
                default=None if required else field.default,
                metavar=kind.__name__.upper(),
                help=said + shown,
            )


def chosen(config: type, options: argparse.Namespace) -> Any:
    """The config filled from the flags."""
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(config) if hasattr(options, f.name)}
    return config(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
