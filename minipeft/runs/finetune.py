"""A whole training run: from a RunConfig to an adapter on disk, resumable at any moment; what `minipeft train` does.

    load -> add_adapter -> pack -> train, with evaluation, log and checkpoints -> save the adapter (or the model) ->
    measure how far it moved

The run folder (folder.py) holds adapter/ or model/, log.jsonl, run.json, result.json, timing.json and checkpoints/.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minipeft.adapters import AdapterReport
from minipeft.adapters.peft_format import save_adapter
from minipeft.data.forms import DataFormat
from minipeft.data.packing import Batch, Batches
from minipeft.data.tokens import Tokenizer
from minipeft.errors import InputError, check_path
from minipeft.files import hash_file, read_object, write_json
from minipeft.models import Decoder
from minipeft.models.checkpoint import check_device, fingerprint, save_model
from minipeft.models.products import name_products
from minipeft.runs.card import CARD, make_training_card, write_card
from minipeft.runs.checkpoints import KEPT, Run, open_run
from minipeft.runs.config import RunConfig
from minipeft.runs.estimates import (
    check_disk,
    choose_evaluation_interval,
    choose_row_length,
    describe_slow_dtype,
    describe_slow_threads,
    estimate,
)
from minipeft.runs.folder import RESULT, RUN, TIMING, check_alike, check_folder, withdraw_run, writing
from minipeft.runs.preparation import (
    Prepared,
    Say,
    check_sharding,
    in_host_memory,
    load_adapted,
    load_base,
    load_whole,
    pack_data,
    prepare,
    set_steps,
)
from minipeft.runs.process import Stopped, explain_memory, make_deterministic, peak_memory, stopping
from minipeft.training.loop import Step, TrainConfig, TrainState, evaluate, train, trained
from minipeft.training.movement import Movement
from minipeft.training.processes import Processes, check_accumulation, check_processes

# settings that may change at resume: the names of the data set (not its hash) and of a folder of its tokens, and the
# checkpoint interval
MAY_DIFFER = ("data", "token_cache", "save_every")
TIMED = ("resumed_at", "train_seconds", "tokens_per_second")  # in timing.json

SHARD_BYTES = 5 * 10**9  # of a file of a model that was trained in shards: transformers' size for many years


def finetune(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = print,
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Train as `config` says in the folder `out`; returns the content of result.json and timing.json.

    `say` gets each line for the user. With `resume` a run continues from its newest checkpoint and ends with the same
    bytes as an uninterrupted one; a complete run writes nothing.

    `processes` (training/processes.py): those that share the work. All of them call `finetune` with the same arguments
    and get the same result; rank 0 alone reads and writes the folder, and calls `say`.

    Raises:
        InputError: invalid input; no folder is left half-written.
        Stopped: SIGTERM or SIGINT was received, by any of the processes; the run is saved.
        LostProcess: another of the processes has ended, or gives no sign of life.
    """
    out = check_path(out, "out")
    processes = check_processes(processes)
    check_accumulation(config.train.accumulate, processes)
    check_sharding(config, processes)
    say = say if processes.rank == 0 else lambda line: None
    with make_deterministic(config.deterministic, config.model.device):
        check_device(config.model.device)
        fresh = not out.exists()
        processes.lead(lambda: check_folder(out))  # before anything large is read
        try:
            prepared = prepare(config.model, config.data)
            processes.lead(lambda: check_disk(config, out))
            identity, about = identify(config, prepared, processes)
            check_alike(identity, processes)
        except InputError:
            if fresh and processes.rank == 0:
                with suppress(OSError):  # another process has written there
                    out.rmdir()
            raise
        run = Run(out)

        def claim() -> None:
            nonlocal run
            run = open_run(out, identity, resume=resume, overwrite=overwrite, about=about)

        try:
            processes.lead(claim)
            if (result := processes.lead(lambda: read_result(out))) is not None:
                say("the run is complete: 0 steps left, nothing is written")
                return result
            return do_run(run, config, prepared, say, processes)
        except InputError:
            if run.is_untouched:  # the model, adapter and rows were refused: the same command, mended, starts afresh
                withdraw_run(out, fresh)
            raise
        finally:
            run.close()


def do_run(run: Run, config: RunConfig, prepared: Prepared, say: Say, processes: Processes) -> dict[str, Any]:
    """Train in the locked folder."""
    tokenizer = prepared.tokenizer
    model, report = load_adapted(config, tokenizer, processes)
    say(str(report))
    say(f"{len(prepared.data):,} rows of {prepared.data.format}")
    for note in prepared.data.notes:
        say(f"note: {note}")
    batches, held_out = pack_data(config, model, prepared, say)
    say(str(batches.report))
    settings = set_steps(config, len(batches))
    movement = Movement.start(model)
    state, clock = restore(run, model, config.model.device, processes)
    for note in run.notes:
        say(f"note: {note}")
    on_cpu = config.model.device == "cpu" and processes.size == 1
    for slow in (describe_slow_dtype(model), describe_slow_threads() if on_cpu else None):
        if slow:
            say(f"note: {slow}")
    for line in describe_sharing(settings.accumulate, processes):
        say(line)
    work = Work(config, settings, model, batches, held_out, state, clock, processes)
    memory = explain_memory(config.packing.batch, choose_row_length(config.packing, model), config.model.device)
    with stopping() as signals, memory:  # from the estimate on, a signal ends the run with a saved step
        say(estimate(config, settings, model, batches, held_out))
        result = train_and_save(run, work, signals)
    sharded = processes.shards and config.method.trains_base
    whole = processes.gather_whole(trained(model)) if sharded else {}

    def end() -> dict[str, Any]:
        tuned = replace(work, model=load_whole(config, whole)) if sharded else work
        return finish(run, tuned, prepared, movement, report, result, say)

    return processes.lead(end)


def restore(run: Run, model: Decoder, device: str, processes: Processes) -> tuple[TrainState, Clock]:
    """Load the newest checkpoint on rank 0, and from there into all processes, which then shard the base; returns the
    training state and the clock."""
    clock, state = Clock(), TrainState(model)

    def load() -> int:
        nonlocal clock
        run.restore(model, state)
        clock = Clock.read(run, state.step)
        return state.step

    state.step = processes.lead(load)
    whole = state
    if processes.shards:
        processes.shard(model, device)
        state = TrainState(model)
        state.step = whole.step
    else:
        processes.share(trained(model), trained(model))
    processes.share(state.exp_avg, whole.exp_avg)
    processes.share(state.exp_avg_sq, whole.exp_avg_sq)
    return state, clock


def describe_sharing(accumulate: int, processes: Processes) -> list[str]:
    """How several processes share a step, in lines for the user."""
    if processes.size == 1:
        return []
    weights = f", and each holds 1/{processes.size} of the base's weights" if processes.shards else ""
    lines = [f"{processes.size} processes share the {accumulate} micro-batches of a step{weights}"]
    if left := accumulate % processes.size:
        lines.append(f"note: {processes.size - left} of them wait for the others in each step's last round")
    return lines


def finish(
    run: Run,
    work: Work,
    prepared: Prepared,
    movement: Movement,
    report: AdapterReport,
    result: dict[str, Any],
    say: Say,
) -> dict[str, Any]:
    """Measure how far training moved the tensors, save them, and write the result; returns it."""
    config, settings, model, tokenizer = work.config, work.settings, work.model, prepared.tokenizer
    place = in_host_memory(config) if work.processes.shards else config
    base = load_base(place).state_dict() if movement.tensors is None else None
    moved = movement.measure(model, settings, base)
    for warning in moved.warnings:
        say(f"warning: {warning}")
    result |= {"trainable": report.trainable, "trainable_percent": report.percent, "adapter_movement": moved.as_json()}
    result = {
        "method": config.method.name,
        "model": config.model.source,
        "learning_rate": settings.learning_rate,
        **result,
        "files": save_trained(run.folder, model, tokenizer, config, prepared.format, work.processes.shards),
    }
    kind = "model" if config.method.trains_base else "adapter"
    about = read_object(run.folder / RUN)
    begun = config.change(
        **{name: about[name] for name in MAY_DIFFER if name in about}
    )  # the card of a resumed run is the same
    write_card(run.folder / kind, make_training_card(begun, about, result))
    return write_result(run.folder, result, peak_memory(config.model.device))


@dataclass(frozen=True)
class Work:
    """The parts of a run: config, training settings, model, data, training state, elapsed time and processes."""

    config: RunConfig
    settings: TrainConfig
    model: Decoder
    batches: Batches
    held_out: list[Batch]
    state: TrainState
    clock: Clock
    processes: Processes


def train_and_save(run: Run, work: Work, signals: list[int]) -> dict[str, Any]:
    """Train to the end: log each step, evaluate and save at their intervals, stop once `signals` holds one."""
    config, settings, model, state, processes = work.config, work.settings, work.model, work.state, work.processes
    every = choose_evaluation_interval(config, work.batches)
    resumed_at, clock = state.step, work.clock
    last: dict[str, Any] = {}
    steps = train(model, work.batches, settings, state, processes)

    def save() -> None:
        if not (processes.shards and config.method.trains_base):
            processes.lead(lambda: write(state))
            return
        whole = copy(state)
        whole.exp_avg = dict(processes.gather_whole(state.exp_avg))
        whole.exp_avg_sq = dict(processes.gather_whole(state.exp_avg_sq))
        parameters = processes.gather_whole(trained(model))
        processes.lead(lambda: write(whole, parameters))

    def write(*held: Any) -> None:
        nonlocal clock
        run.save(model, *held)
        clock = clock.write(run)

    with show_steps(settings, state, processes) as bar:
        if state.step == 0 and work.held_out:
            loss = evaluate(model, work.held_out, processes, settings.batch_invariant)
            processes.lead(lambda: run.log({"step": 0, "dev_loss": loss}))
        mark = time.perf_counter()
        for step in log_error(steps, run, state, processes):
            clock = clock.add(step, time.perf_counter() - mark)
            entry = make_log_entry(step)
            final = step.number == settings.steps
            if work.held_out and (step.number % every == 0 or final):
                entry["dev_loss"] = evaluate(model, work.held_out, processes, settings.batch_invariant)
            processes.lead(lambda entry=entry: run.log(entry))  # type: ignore[misc]
            last = {**last, **entry}
            bar.set_postfix(loss=f"{step.loss:.3f}", dev=f"{last.get('dev_loss', float('nan')):.3f}", refresh=False)
            bar.update()
            stop = processes.agree(signals[0] if signals else 0)
            if stop or step.number % config.save_every == 0 or final:
                save()
            if stop:
                raise Stopped(stop, step.number)
            mark = time.perf_counter()
    last = last or processes.lead(lambda: read_last_entry(run))
    return {
        "steps": state.step,
        "resumed_at": resumed_at,
        "train_seconds": clock.seconds,
        "dev_loss": last.get("dev_loss"),
        "loss": last.get("loss"),
        "tokens_per_second": clock.tokens / clock.seconds if clock.tokens else None,
    }


def show_steps(settings: TrainConfig, state: TrainState, processes: Processes) -> tqdm[Any]:
    """The progress bar of the steps, on rank 0 alone and in a terminal alone."""
    hidden = None if processes.rank == 0 else True
    return tqdm(total=settings.steps, initial=state.step, unit="step", file=sys.stderr, disable=hidden)


@dataclass(frozen=True)
class Clock:
    """Seconds of training alone, and tokens, of all steps up to `step`, whichever process did them.

    Until a run is complete, timing.json holds them at its last two saves: {"saves": [[step, seconds, tokens], ...]}.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    saves: tuple[tuple[int, float, int], ...] = ()

    @staticmethod
    def read(run: Run, step: int) -> Clock:
        """The clock of a run that goes on after `step`; without a record it starts at 0, and a note says so."""
        if step == 0:
            return Clock()
        try:
            saves = tuple((int(at), float(seconds), int(tokens)) for at, seconds, tokens in
                          read_object(run.folder / TIMING)["saves"])  # fmt: skip
            return next(Clock(*save, saves) for save in saves if save[0] == step)
        except (InputError, KeyError, TypeError, ValueError, StopIteration):
            run.notes.append(f"{TIMING} has no time for step {step}: the seconds of the result begin there")
            return Clock(step)

    def add(self, step: Step, seconds: float) -> Clock:
        """The clock after one more step."""
        return replace(self, step=step.number, seconds=self.seconds + seconds, tokens=self.tokens + step.tokens)

    def write(self, run: Run) -> Clock:
        """Record the clock, for the checkpoint that was just written."""
        before = [save for save in self.saves if save[0] < self.step]
        saves = (*before, (self.step, self.seconds, self.tokens))[-KEPT:]
        with writing(run.folder / TIMING):
            write_json(run.folder / TIMING, {"saves": saves})
        return replace(self, saves=saves)


def make_log_entry(step: Step) -> dict[str, Any]:
    """Build the log object of a step."""
    names = {"step": "number", "loss": "loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm",
             "tokens": "tokens", "targets": "targets"}  # fmt: skip
    return {name: getattr(step, field) for name, field in names.items()}


def log_error(steps: Iterator[Step], run: Run, state: TrainState, processes: Processes) -> Iterator[Step]:
    """Pass the steps on; an error that ends them (a non-finite loss, gradient, weight or moment) is logged.

    All processes get the same sums, and therefore the same error.
    """
    try:
        yield from steps
    except InputError as error:
        if processes.rank == 0:  # without waiting for the others: memory may have run out on this one alone
            run.log({"step": state.step, "error": str(error)})
        raise


def read_last_entry(run: Run) -> dict[str, Any]:
    """Read the last log entry of a run without steps left; empty if the log was lost."""
    lines = run.log_file.read_text(encoding="utf-8").splitlines()
    return json.loads(lines[-1]) if lines else {}


def identify(
    config: RunConfig, prepared: Prepared, processes: Processes | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Build run.json: the settings that determine a run's bits and must match at resume, and the others.

    The number of processes is not among them; that they sum gradients in another order than one process is.
    """
    settings = config.as_json()
    identity = {
        "arguments": {name: value for name, value in settings.items() if name not in MAY_DIFFER},
        "model_sha256": fingerprint(config.model.source, config.model.revision),
        "tokenizer_sha256": prepared.tokenizer.fingerprint,
        "data_sha256": prepared.data.sha256,
        "minipeft": version("minipeft"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "products": name_products(config.model.device),
    }
    processes = check_processes(processes)
    if not processes.exact or (processes.shards and config.method.trains_base):
        identity["reduce"] = "fast"
    if (chat := prepared.chat) is not None:
        identity["chat_template_sha256"] = hashlib.sha256(chat.text.encode()).hexdigest()
        if chat.writes_date:  # into each chat: a run that resumes on another day would see another text
            identity["chat_template_date"] = str(date.today())
    return identity, {name: settings[name] for name in MAY_DIFFER}


def save_trained(
    folder: Path, model: Decoder, tokenizer: Tokenizer, config: RunConfig, form: DataFormat, sharded: bool = False
) -> dict[str, str]:
    """Save adapter/ with PEFT's two files or, after full tuning, model/ with its tokenizer, and beside them the data's
    form and template; returns the sha256 of all."""
    full = config.method.trains_base
    place = folder / ("model" if full else "adapter")
    if full:
        save_model(model, place, tokenizer, SHARD_BYTES if sharded else None)
    else:
        save_adapter(model, place)
    form.write(place)
    return {f"{place.name}/{file.name}": hash_file(file) for file in sorted(place.iterdir()) if file.name != CARD}


def write_result(folder: Path, result: dict[str, Any], peak_bytes: int) -> dict[str, Any]:
    """Write timing.json, which differs between equal runs, then result.json, which does not; it marks completion."""
    timing = {**{name: result[name] for name in TIMED}, "peak_memory_bytes": peak_bytes}
    same = {name: value for name, value in result.items() if name not in TIMED}
    write_json(folder / TIMING, timing)
    write_json(folder / RESULT, same)
    return same | timing


def read_result(folder: Path) -> dict[str, Any] | None:
    """Read the result of a complete run if all its files are unchanged; else return None."""
    if not (folder / RESULT).exists() or not (folder / TIMING).exists():
        return None
    result = read_object(folder / RESULT)
    if not isinstance(files := result.get("files"), dict):
        return None
    for name, digest in files.items():
        if not (folder / name).is_file() or hash_file(folder / name) != digest:
            return None
    return result | read_object(folder / TIMING)
