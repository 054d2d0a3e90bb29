"""The numbers of each stop: one function a stop, which returns its values by name."""

from collections.abc import Callable, Mapping

from minipeft.tour.bench import Bench
from minipeft.tour.measures import adapters, answers, machine, rows, scores, training, virtual
from minipeft.tour.values import Value

Measure = Callable[[Bench], Mapping[str, Value]]
MEASURES: dict[str, Measure] = {  # stop -> function, in the order of the walk
    "tokens": rows.measure_tokens,
    "packed-row": rows.measure_packed_row,
    "who-sees-whom": rows.measure_visibility,
    "lora": adapters.measure_lora,
    "zero-b": adapters.measure_zero_b,
    "merge": adapters.measure_merge,
    "prefix": virtual.measure_prefix,
    "prompt": virtual.measure_prompt,
    "ia3": adapters.measure_ia3,
    "dora": adapters.measure_dora,
    "loss": training.measure_loss,
    "step": training.measure_step,
    "dropout": training.measure_dropout,
    "saving": training.measure_saving,
    "cache": answers.measure_cache,
    "sampling": answers.measure_sampling,
    "bleu": scores.measure_bleu,
    "codebleu": scores.measure_codebleu,
    "kernel": machine.measure_kernel,
    "memory": machine.measure_memory,
}
