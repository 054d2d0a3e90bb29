"""A whole training run: from arguments to an adapter on disk, resumable at any moment; what `minipeft train` does.

    load -> add_adapter -> pack -> train, with evaluation, log and checkpoints -> save the adapter (or the model) -> say
    how far it moved

The run folder (runs.py) holds adapter/ or model/, log.jsonl, run.json, result.json and checkpoints/.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minipeft.adapters import add_adapter, method_of
from minipeft.adapters.peft_format import save_adapter
from minipeft.data.examples import Pairs, encode_pairs, load_pairs, shared_pairs, split_by_question
from minipeft.data.packing import Batch, Batches, pack
from minipeft.data.tokens import SETTINGS, Tokenizer, load_tokenizer
from minipeft.errors import InputError
from minipeft.files import read_object, write_json, write_whole
from minipeft.hub import fetch
from minipeft.models import Decoder
from minipeft.models.checkpoint import fingerprint, load_model, save_model
from minipeft.runs.checkpoints import RESULT, Run, check_folder, open_run
from minipeft.runs.config import DTYPES, TuneConfig
from minipeft.runs.estimates import check_room, estimate, evaluated_every, length_of
from minipeft.runs.process import Stopped, check_device, enough_memory, exactly, peak_memory, stopping
from minipeft.training.loop import Step, TrainConfig, TrainState, evaluate, train
from minipeft.training.movement import Movement
from minipeft.training.recipes import recipe

TOKENIZER_FILES = ["tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", *SETTINGS[:2]]
DEV_LENGTH = 1024  # tokens of a row of held-out pairs


def tune(
    config: TuneConfig,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Do the run that `config` describes in the folder `out`; returns what result.json and timing.json hold.

    `say` is given each line that a person should read. With `resume` a run goes on from its newest checkpoint and ends
    with the same bytes as one that was never stopped; of one that has ended nothing is written again.

    Raises:
        InputError: anything that the caller gave is wrong; the folder is not half-written.
        Stopped: SIGTERM or SIGINT came; the run is saved.
    """
    out = Path(out)
    with exactly(config.deterministic, config.device):
        check_device(config.device)
        fresh = not out.exists()
        check_folder(out)  # before anything large is read
        try:
            pairs, tokenizer = load_pairs(config.data), load_tokens(config)
            check_room(config, out)
            identity, about = identify(config, pairs, tokenizer), {"data": config.data, "save_every": config.save_every}
        except InputError:
            if fresh:
                with suppress(OSError):  # not empty: somebody else is there
                    out.rmdir()
            raise
        run = open_run(out, identity, resume=resume, overwrite=overwrite, about=about)
        try:
            if (ended := ended_result(run.folder)) is not None:
                say("the run has ended: 0 steps to do, nothing is written")
                return ended
            return tune_in(run, config, pairs, tokenizer, say)
        finally:
            run.close()


def tune_in(
    run: Run, config: TuneConfig, pairs: Pairs, tokenizer: Tokenizer, say: Callable[[str], None]
) -> dict[str, Any]:
    """`tune` once the folder is ours."""
    model = load_base(config, tokenizer)
    report = add_adapter(model, config.adapter(), tokenizer, seed=config.seed)
    say(str(report))
    for note in pairs.notes:
        say(f"note: {note}")
    batches, dev = rows_for(config, model, tokenizer, pairs, say)
    say(str(batches.report))
    settings = train_config(config, model, len(batches))
    movement = Movement.start(model)
    state = TrainState(model)
    run.restore(model, state)
    for note in run.notes:
        say(f"note: {note}")
    say(estimate(config, settings, model, batches, dev))
    with enough_memory(config.batch, length_of(config, model), config.device):
        result = loop(run, config, settings, model, batches, dev, state, say)
    base = load_base(config, tokenizer).state_dict() if movement.tensors is None else None
    moved = movement.measure(model, settings, base)
    for warning in moved.warnings:
        say(f"warning: {warning}")
    result |= {"trainable": report.trainable, "trainable_percent": report.percent, "adapter_movement": moved.as_json()}
    return write_result(run.folder, config, settings, result, save_result(run.folder, model, config))


def loop(
    run: Run,
    config: TuneConfig,
    settings: TrainConfig,
    model: Decoder,
    batches: Batches,
    dev: list[Any],
    state: TrainState,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train to the end: log each step, evaluate and save now and then, stop when asked."""
    every = evaluated_every(config, batches)
    begun_at, tokens, seconds = state.step, 0, 0.0  # seconds of training alone
    last: dict[str, Any] = {}
    with (
        stopping() as stop,
        tqdm(total=settings.steps, initial=state.step, unit="step", file=sys.stderr, disable=None) as bar,
    ):
        if state.step == 0 and dev:
            run.log({"step": 0, "dev_loss": evaluate(model, dev)})
        mark = time.perf_counter()
        for step in noted(train(model, batches, settings, state), run, state):
            seconds += time.perf_counter() - mark
            entry: dict[str, Any] = {
                "step": step.number,
                "loss": step.loss,
                "learning_rate": step.learning_rate,
                "grad_norm": step.grad_norm,
                "tokens": step.tokens,
                "targets": step.targets,
            }
            if dev and (step.number % every == 0 or step.number == settings.steps):
                entry["dev_loss"] = evaluate(model, dev)
            run.log(entry)
            last, tokens = {**last, **entry}, tokens + step.tokens
            bar.set_postfix(loss=f"{step.loss:.3f}", dev=f"{last.get('dev_loss', float('nan')):.3f}", refresh=False)
            bar.update()
            if stop or step.number % config.save_every == 0 or step.number == settings.steps:
                run.save(model, state)
            if stop:
                raise Stopped(stop[0], step.number)
            mark = time.perf_counter()
    last = last or finished_entry(run)
    return {
        "steps": state.step,
        "resumed_at": begun_at,
        "train_seconds": seconds,
        "dev_loss": last.get("dev_loss"),
        "loss": last.get("loss"),
        "tokens_per_second": tokens / seconds if tokens else None,
    }


def noted(steps: Iterator[Step], run: Run, state: TrainState) -> Iterator[Step]:
    """The same steps; what ends them early (a loss, gradient, weight or moment not finite) goes into the log."""
    try:
        yield from steps
    except InputError as error:
        run.log({"step": state.step, "error": str(error)})
        raise


def finished_entry(run: Run) -> dict[str, Any]:
    """The last line of the log of a run that had no step left to do; nothing where the log was lost."""
    lines = run.log_file.read_text(encoding="utf-8").splitlines()
    return json.loads(lines[-1]) if lines else {}


def load_tokens(config: TuneConfig) -> Tokenizer:
    """The tokenizer of the model that is tuned."""
    tokenizer = load_tokenizer(config.model, revision=config.revision)
    return tokenizer if config.eos_token is None else tokenizer.with_eos(config.eos_token)


def load_base(config: TuneConfig, tokenizer: Tokenizer) -> Decoder:
    """The model that is tuned."""
    dtype = DTYPES[config.dtype] if config.dtype else torch.float32 if config.method == "full" else None
    model = load_model(
        config.model, dtype=dtype, device=config.device, revision=config.revision, legacy_bin=config.legacy_bin
    )
    tokenizer.check_fits(model.config.vocab_size, config.model)
    return model


def rows_for(
    config: TuneConfig, model: Decoder, tokenizer: Tokenizer, pairs: Pairs, say: Callable[[str], None]
) -> tuple[Batches, list[Any]]:
    """The batches to train on, and those held out."""
    kept, held = split_by_question(pairs, config.held_out) if config.held_out else (pairs, None)
    if held is not None and (both := shared_pairs(kept, held)):
        say(f"warning: {both} of the {len(held)} pairs held out are also trained on: the held-out loss flatters")
    shared: dict[str, Any] = {"length": length_of(config, model), "virtual_tokens": model.virtual_tokens}
    batches = pack(
        encode_pairs(kept, tokenizer),
        tokenizer,
        batch=config.batch,
        seed=config.seed,
        loss_mask=config.loss_mask,
        isolate=config.isolate,
        **shared,
    )
    return batches, [] if held is None else held_rows(config, model, tokenizer, held)


def held_rows(config: TuneConfig, model: Decoder, tokenizer: Tokenizer, held: Pairs) -> list[Batch]:
    """The held-out pairs, whole wherever the context allows, however short the rows are that are trained on; isolated,
    so that packing changes no loss. Every seed has the same ones."""
    rows = pack(
        encode_pairs(held, tokenizer),
        tokenizer,
        length=min(DEV_LENGTH, model.config.context),
        batch=1,
        virtual_tokens=model.virtual_tokens,
        loss_mask=config.loss_mask,
        shuffle=False,
    )
    return list(rows)


def train_config(config: TuneConfig, model: Decoder, batches: int) -> TrainConfig:
    """The method's recipe, with what the caller chose."""
    size = sum(p.numel() for p in model.parameters())
    chosen: dict[str, Any] = {}
    chosen |= recipe(
        config.method,
        parameters=size,
        family=model.config.model_type,
        init=config.init,
        reparam=config.reparam is not None,
    ).settings()
    if config.learning_rate is not None:
        chosen["learning_rate"] = config.learning_rate
    steps = config.steps or max(1, round(config.epochs * batches / config.accumulate))
    return TrainConfig(
        steps=steps,
        accumulate=config.accumulate,
        seed=config.seed,
        activation_checkpointing=config.activation_checkpointing,
        **chosen,
    )


def identify(config: TuneConfig, pairs: Pairs, tokenizer: Tokenizer) -> dict[str, Any]:
    """All that decides the bits of a run: run.json, which a resumed run is held against."""
    arguments = {name: value for name, value in asdict(config).items() if name not in ("save_every", "data")}
    return {
        "arguments": arguments,
        "model_sha256": fingerprint(config.model, config.revision),
        "tokenizer_sha256": tokenizer.fingerprint,
        "data_sha256": pairs.sha256,
        "minipeft": version("minipeft"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def save_result(folder: Path, model: Decoder, config: TuneConfig) -> dict[str, str]:
    """adapter/ with PEFT's two files, after full tuning model/, complete with its tokenizer; returns their sha256."""
    whole = method_of(model.adapter) == "full"
    place = folder / ("model" if whole else "adapter")
    if whole:
        save_model(model, place)
        source = fetch(config.model, ["config.json"], revision=config.revision, optional=TOKENIZER_FILES)
        for name in TOKENIZER_FILES:
            if (source / name).exists():
                data = (source / name).read_bytes()
                write_whole(place / name, lambda stream, data=data: stream.write(data))  # type: ignore[misc]
    else:
        save_adapter(model, place)
    return {f"{place.name}/{file.name}": sha256_of(file) for file in sorted(place.iterdir())}


def sha256_of(file: Path) -> str:
    """The sha256 of a file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_result(
    folder: Path, config: TuneConfig, settings: TrainConfig, result: dict[str, Any], files: dict[str, str]
) -> dict[str, Any]:
    """timing.json: what differs from run to run; then result.json: what does not. Its being there says: ended."""
    timing = {name: result.pop(name) for name in ("resumed_at", "train_seconds", "tokens_per_second")}
    timing["peak_memory_bytes"] = peak_memory(config.device)
    whole = {
        "method": config.method,
        "model": config.model,
        "learning_rate": settings.learning_rate,
        **result,
        "files": files,
    }
    write_json(folder / "timing.json", timing)
    write_json(folder / RESULT, whole)
    return whole | timing


def ended_result(folder: Path) -> dict[str, Any] | None:
    """What a run that has ended returned, if each file that it wrote is still as it was."""
    if not (folder / RESULT).exists() or not (folder / "timing.json").exists():
        return None
    result = read_object(folder / RESULT)
    for name, digest in result.get("files", {}).items():
        if not (folder / name).is_file() or sha256_of(folder / name) != digest:
            return None
    return result | read_object(folder / "timing.json")
