"""`minipeft inspect ADAPTER --html`: a self-contained page on an adapter, or on two side by side."""

from __future__ import annotations

import base64
import hashlib
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from minipeft.adapters.microscope import Sample, Update, describe_samples
from minipeft.files import read_text
from minipeft.study.charts import PATTERNS, Bar, draw_bars, escape, wrap
from minipeft.study.curves import draw_axis, draw_base, draw_legend, draw_line

HERE = Path(__file__).parent
MOST_VALUES = 64  # singular values that are drawn
HEIGHT = 150
KINDS = ("tuned", "untuned")  # of bars: the first sample's are solid, the second's striped
SORTING = read_text(HERE / "page.js").split("\n\nconst form")[0]  # the script's first part: sortable tables


def draw_adapter_page(samples: Sequence[Sample]) -> str:
    """Render the page for one or two samples."""
    digest = base64.b64encode(hashlib.sha256(SORTING.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    first, *rest = describe_samples(samples)
    names = " and ".join(sample.name for sample in samples)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>minipeft inspect: {escape(names)}</title><style>{read_text(HERE / 'page.css')}</style></head>\n"
        f"<body>{PATTERNS}<main><h1>Adapter microscope: {escape(names)}</h1>"
        f'<p class="verdict">{escape(first)}</p>{"".join(f"<p>{escape(line)}</p>" for line in rest)}'
        + "".join(f"<p>{escape(line)}</p>" for line in (*compare_ranks(samples), *describe_movement(samples)))
        + f"<h2>Update by layer</h2>{draw_layers(samples)}"
        f'<h2>Spectra</h2><p class="soft note">Singular values over the largest, the median of all layers, by kind of '
        f"module. A flat line uses its whole rank; a steep one needs less.</p>{draw_spectra(samples)}"
        f"<h2>Modules</h2>{draw_table(samples)}</main>\n<script>{SORTING}</script></body></html>\n"
    )


def compare_ranks(samples: Sequence[Sample]) -> list[str]:
    """Compare the ranks of two samples in the modules that both have."""
    if len(samples) != 2:
        return []
    one, two = ({update.path: update for update in sample.updates} for sample in samples)
    shared = [path for path in one if path in two and one[path].energy_rank and two[path].energy_rank]
    if not shared:
        return [f"{samples[0].name} and {samples[1].name} change no module of one name"]
    ratio = statistics.median(two[path].energy_rank / one[path].energy_rank for path in shared)
    stable = statistics.median(two[path].stable_rank / one[path].stable_rank for path in shared)
    return [
        f"In the {len(shared)} modules that both change, the rank for 90 % of the energy of {samples[1].name} is "
        f"{ratio:.3g} times that of {samples[0].name} (median), its stable rank {stable:.3g} times"
    ]


def describe_movement(samples: Sequence[Sample]) -> list[str]:
    """How far each run moved its tensors from their init, where the run's folder says so."""
    found = []
    for sample in samples:
        mean, largest, budget, steps = (sample.movement.get(name) for name in ("mean", "largest", "budget", "steps"))
        if all(isinstance(number, int | float) for number in (mean, largest, budget, steps)):
            found.append(
                f"{sample.name}: moved from its init by {mean:.3g} on average, by {largest:.3g} at most; the learning "
                f"rates of its {steps} steps sum to {budget:.3g}"
            )
    return found


def draw_layers(samples: Sequence[Sample]) -> str:
    """Draw the size of the update of each layer: the share of |W| where W is known, else |U|."""
    known = all(update.share is not None for sample in samples for update in sample.updates)
    found = {update.layer for sample in samples for update in sample.updates}
    bars = []
    for layer in sorted(found, key=lambda layer: -1 if layer is None else layer):
        for sample, kind in zip(samples, KINDS):
            mine = [update for update in sample.updates if update.layer == layer]
            if mine and all(math.isfinite(update.norm) for update in mine):
                size = math.sqrt(sum(update.norm**2 for update in mine))
                if known:
                    size /= math.sqrt(sum((update.base_norm or 0.0) ** 2 for update in mine))
                place = "outside the layers" if layer is None else f"layer {layer}"
                name = f"{place}, {sample.name}" if len(samples) > 1 else place
                bars.append(Bar(name, size, size, size, f"{100 * size:.2f} %" if known else f"{size:.3g}", kind))
    return draw_bars(bars, "Update by layer", unit="|U| / |W|" if known else "|U|") if bars else ""


def draw_spectra(samples: Sequence[Sample]) -> str:
    """Draw the spectra of each kind of module, a line for each sample."""
    kinds = list(dict.fromkeys(update.kind for sample in samples for update in sample.updates))
    panels = []
    for kind in kinds:
        lines = [
            (place, take_median([update for update in sample.updates if update.kind == kind]))
            for place, sample in enumerate(samples)
        ]
        panels.append(draw_spectrum(kind, [(place, line) for place, line in lines if line]))
    legend = draw_legend([sample.name for sample in samples]) if len(samples) > 1 else ""
    return f'{legend}<div class="panels">{"".join(panels)}</div>'


def take_median(updates: Sequence[Update]) -> list[float]:
    """The median of the updates' singular values, each over its largest."""
    spectra = [update.singular for update in updates if update.singular and 0 < update.singular[0] < math.inf]
    if not spectra:
        return []
    size = min(MOST_VALUES, *(len(values) for values in spectra))
    return [statistics.median(values[place] / values[0] for values in spectra) for place in range(size)]


def draw_spectrum(kind: str, lines: Sequence[tuple[int, Sequence[float]]]) -> str:
    """Draw one panel: singular values over the largest, by their number."""
    most = max((len(values) for _, values in lines), default=1)
    across = lambda number: 100 * (number - 1) / max(1, most - 1)
    down = lambda value: HEIGHT * (1 - value)
    body = draw_axis([(down(tick), f"{tick:g}") for tick in (0.0, 0.5, 1.0)])
    for place, values in lines:
        points = [(float(number), value) for number, value in enumerate(values, 1)]
        body += draw_line(points, across, down, HEIGHT, f"curve s{place}")
    body += draw_base([(across(tick), str(tick)) for tick in sorted({1, (most + 1) // 2, most})], HEIGHT)
    said = f"Spectrum of {kind}"
    return f'<div class="panel"><h3>{escape(kind)}</h3>{wrap(body, HEIGHT + 20, said)}</div>'


def draw_table(samples: Sequence[Sample]) -> str:
    """Render all modules with their numbers; dead and exploding ones say why."""
    heads = ("shape", "|U|", "|U| / |W|", "largest singular value", "stable rank", "rank for 90 %", "remark")
    rows = []
    for sample in samples:
        faults = sample.find_faults()
        for update in sample.updates:
            name = f"{update.path} ({sample.name})" if len(samples) > 1 else update.path
            largest = update.singular[0] if update.singular else 0.0
            numbers: list[tuple[str, float | None]] = [
                (" x ".join(map(str, update.shape)), None),
                (f"{update.norm:.3g}", update.norm),
                ("" if update.share is None else f"{100 * update.share:.2f} %", update.share),
                (f"{largest:.3g}", largest),
                (f"{update.stable_rank:.1f}", update.stable_rank),
                (f"{update.energy_rank} of {len(update.singular)}", update.energy_rank),
                (faults.get(update.path, ""), None),
            ]
            cells = "".join(
                f"<td{'' if value is None or not math.isfinite(value) else f' data-v={value:.6g}'}>{escape(text)}</td>"
                for text, value in numbers
            )
            rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    return (
        '<div class="scroll" tabindex="0"><table class="sortable"><thead><tr><th><span class="hidden">module</span>'
        f"</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
