"""Merge an adapter into a plain model's folder, and push a folder to the hub.

merge    load -> compare unmerged and merged (adapters/verdict.py) -> only then write the folder
push     upload the files of an adapter or a model, by name, as one commit
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minipeft.adapters import merge_adapter
from minipeft.adapters.inspection import describe
from minipeft.adapters.peft_format import CONFIG, WEIGHTS
from minipeft.adapters.peft_virtual import OWN, STATE
from minipeft.adapters.verdict import MergeReport
from minipeft.data.examples import load_pairs
from minipeft.data.forms import FORM_FILE
from minipeft.data.templates import format_prompt
from minipeft.data.tokenizer_files import FILES
from minipeft.errors import InputError, check_fields, option
from minipeft.files import read_text
from minipeft.hub import push
from minipeft.models.checkpoint import INDEX, SINGLE, find_tensors, save_model
from minipeft.runs.answers import AnswersConfig, find_format, load_tuned
from minipeft.runs.card import CARD, make_merged_card, write_card
from minipeft.runs.config import DTYPES, ModelConfig


@dataclass(frozen=True)
class MergeConfig:
    """Settings of a merge: the adapter, the prompts of the comparison (`prompts` or `data`), and the output folder."""

    model: ModelConfig
    adapter: Path = option(help="folder or hub id of an adapter, ours or PEFT's")
    out: Path = option(help="folder of the merged model")
    adapter_revision: str | None = option(None, "commit, tag or branch of the adapter on the hub")
    prompts: str | None = option(
        None, "text file with a prompt to compare on in each line, put into the training template"
    )
    data: str | None = option(None, "data set whose questions to compare on: conala, demo, or a file of pairs")
    split: str = option("test", "split of conala or demo")
    limit: int = option(32, "compare on the first N prompts only", least=1)
    raw: bool = option(False, "use the lines of --prompts unchanged, without the training template")
    new_tokens: int = option(32, "maximum number of tokens in a compared answer", least=1)
    dtype: str | None = option(None, "dtype of the merged weights; default the model's own", choices=DTYPES)

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.prompts is None) == (self.data is None):
            raise InputError("give --prompts FILE or --data DATA: the merged model is compared on them", where="merge")
        if self.raw and self.data is not None:
            raise InputError("has no effect with --data", where="raw")


def read_prompts(config: MergeConfig) -> list[str]:
    """Read the prompts to compare on.

    Raises:
        InputError: the file or the data set cannot be read, or is empty.
    """
    if config.prompts is None:
        return [
            format_prompt(pair.intent)
            for pair in load_pairs(str(config.data), split=config.split).items[: config.limit]
        ]
    lines = [line for line in read_text(Path(config.prompts)).splitlines() if line.strip()][: config.limit]
    if not lines:
        raise InputError("holds no prompts", file=config.prompts)
    return lines if config.raw else [format_prompt(line) for line in lines]


def merge_into_folder(config: MergeConfig, say: Callable[[str], None] = print) -> MergeReport:
    """Merge an adapter into its model and write a plain model's folder with tokenizer and card.

    `say` gets the report before anything is written.

    Raises:
        InputError: the folder exists and is not empty; the adapter cannot be loaded or merged; a prompt cannot be
            answered. Nothing is written.
    """
    out = config.out
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError("exists already", file=out, hint="Name another --out, or remove it")
    prompts = read_prompts(config)
    tuned = AnswersConfig(config.model, adapter=config.adapter, adapter_revision=config.adapter_revision)
    form = find_format(tuned)
    base, tokenizer = load_tuned(tuned, say)
    dtype = None if config.dtype is None else DTYPES[config.dtype]
    report = merge_adapter(
        base,
        check=prompts,
        tokenizer=tokenizer,
        new_tokens=config.new_tokens,
        dtype=dtype,
        dequantize=config.model.quantize is not None,
    )
    say(str(report))
    write_card(out, make_merged_card(config.model, str(config.adapter), report))
    save_model(base, out, tokenizer)
    if form is not None:  # so that generate uses the adapter's template for the merged model
        form.write(out)
    return report


@dataclass(frozen=True)
class PushConfig:
    """Hub settings of a push."""

    public: bool = option(False, "make the repository public; default private")
    revision: str | None = option(None, "branch, created if it does not exist; default main")

    def __post_init__(self) -> None:
        check_fields(self)


def publish(folder: Path, hub_id: str, config: PushConfig) -> tuple[str, list[str]]:
    """Push the files of an adapter's or a model's folder; returns the commit and the names of files not pushed.

    Raises:
        InputError: the folder holds neither, or is damaged; the hub refuses.
    """
    names = list_own_files(folder, str(describe(folder)["kind"]))
    left = sorted(path.name for path in folder.iterdir() if path.name not in names)
    return push(folder, names, hub_id, private=not config.public, revision=config.revision), left


def list_own_files(folder: Path, kind: str) -> list[str]:
    """List the existing files that belong to an adapter or a model; no code, no pickle."""
    if kind == "adapter":
        known = [CONFIG, WEIGHTS, OWN, STATE, FORM_FILE, *FILES, CARD]
    else:
        shards = sorted({info.file.name for info in find_tensors(folder, folder, None).values()})
        known = ["config.json", SINGLE, INDEX, *shards, "generation_config.json", FORM_FILE, *FILES, CARD]
    return [name for name in dict.fromkeys(known) if (folder / name).exists()]
