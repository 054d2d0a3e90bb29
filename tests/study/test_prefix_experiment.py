"""The prefix experiment: its trials, and a small run of it on stories260K with a few steps a trial."""

import dataclasses
import itertools
import json
from dataclasses import replace

import pytest

from minipeft.data.examples import encode_pairs, load_pairs
from minipeft.data.packing import PackConfig, pack
from minipeft.data.tokens import load_tokenizer
from minipeft.models.checkpoint import load_model
from minipeft.runs.config import collect_settings
from minipeft.runs.preparation import pack_held_out
from minipeft.study import prefix_experiment as experiment
from minipeft.study.drafts import Base, make_cells
from minipeft.study.prefix_experiment import Trial, conclude, format_loss, make_grids
from minipeft.study.presets import StudyConfig
from minipeft.study.report import write_report
from minipeft.study.results import assemble
from minipeft.study.rows import Data, Group, Results, Training
from minipeft.study.runner import conduct
from minipeft.study.table import name_method
from minipeft.training.loop import evaluate


def test_the_grid_is_what_it_says():
    trials = experiment.list_grid()
    prefixes = {(t.init, t.learning_rate, bool(t.reparam)) for t in trials if t.method == "prefix"}
    wanted = {(i, r, m) for i in ("peft", "normal", "text") for r in (2e-4, 1e-3, 5e-3, 3e-2) for m in (False, True)}
    assert prefixes == wanted
    others = [(t.method, t.learning_rate, t.init) for t in trials if t.method != "prefix"]
    assert sorted(others, key=str) == [("lora", 0.0003, None), ("lora", 0.001, None), ("prompt", 0.03, "text")]
    assert len(trials) == len(set(trials)) == 27
    assert {t.steps for t in trials} == {60}
    long = experiment.list_long_runs()
    assert [(t.steps, t.seed) for t in long] == [(300, seed) for seed in (0, 1, 2) for _ in range(6)]
    for trial in (*trials, *long):
        assert trial.settings().keys() <= {flag.replace("-", "_") for flag in collect_settings(trial.method)}


def test_each_method_sees_the_same_tokens_in_a_step():
    lengths = {t.method: t.settings()["length"] for t in experiment.list_grid()}
    assert lengths == {"lora": 220, "prefix": 240, "prompt": 240}  # 20 columns stand beside the 220


def test_the_first_seed_of_a_long_run_answers():
    cells = make_cells(StudyConfig(preset="prefix"), {"demo": Base("demo")}, 100)
    assert len(cells) == 1 + 27 + 18
    assert [(c.method, c.seed, c.steps) for c in cells[1:] if c.generate] == [
        (t.method, 0, 300) for t in experiment.list_long_runs(seeds=1)
    ]
    assert [c.seed for c in cells if c.method == "zero-shot"] == [0]
    assert "lora" not in {
        c.method for c in make_cells(StudyConfig("prefix", method=("prompt",)), {"demo": Base("demo")}, 100)
    }


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """Pairs that a model of children's stories can learn."""
    names = ["Lily", "Tom", "Sue", "Ben", "Mia", "Max"]
    rows = [
        {"intent": f"a story of {a} and {b}", "snippet": f"{a} met {b}. {b} ran.", "question_id": n}
        for n, (a, b) in enumerate(itertools.product(names, names))
    ]
    file = tmp_path_factory.mktemp("stories") / "stories.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_small_experiment(inside, stories, model, tmp_path, monkeypatch):
    trials = [
        Trial("prefix", 2e-4, "peft"),
        Trial("prefix", 5e-2, "peft"),
        Trial("prefix", 2e-4, "text"),
        Trial("prefix", 5e-2, "text"),
        Trial("prefix", 5e-3, "text", 32),
        Trial("prompt", 3e-2, "text"),
        Trial("lora", 1e-2),
    ]
    few = lambda found, **change: [dataclasses.replace(t, **change) for t in found]
    monkeypatch.setattr(experiment, "list_grid", lambda: few(trials, steps=6))
    monkeypatch.setattr(
        experiment, "list_long_runs", lambda seeds: [t for s in range(seeds) for t in few(trials[3:4], steps=8, seed=s)]
    )
    config, out = StudyConfig("prefix", model=(str(model),), data=str(stories), seeds=2), tmp_path / "s"
    found = assemble(conduct(config, out, say=lambda line: None), config, out, "minipeft study")
    results = found.as_json()
    groups = {(g["method"], g["init"], g["learning_rate"], g["steps"]): g for g in results["groups"] if g["model"]}
    noise, text = groups["prefix", "peft", 2e-4, 6], groups["prefix", "text", 5e-2, 6]
    network, prompt = groups["prefix", "text", 5e-3, 6], groups["prompt", "text", 3e-2, 6]
    lora, base = groups["lora", None, 1e-2, 6], groups["zero-shot", None, None, 0]

    assert noise["dev_loss_start"] > text["dev_loss_start"] + 1
    assert text["dev_loss_start"] == pytest.approx(network["dev_loss_start"], rel=1e-6)
    assert text["dev_loss_start"] == pytest.approx(prompt["dev_loss_start"], rel=1e-5)  # the free check: one text
    assert lora["dev_loss_start"] == pytest.approx(base["dev_loss"], rel=1e-6)
    assert lora["dev_loss"] < lora["dev_loss_start"] - 0.1
    for group in (text, network, prompt):
        assert group["dev_loss"] < group["dev_loss_start"]
    dead = lambda group: any("dead adapter" in flag for flag in group["flags"])
    assert dead(noise)
    assert not dead(text)

    c = load_model(model).config
    assert text["stored"] == network["stored"] == text["trainable"] == 20 * c.layers * 2 * c.kv_heads * c.head_width
    assert network["trainable"] > network["stored"]
    assert (prompt["stored"], lora["stored"]) == (20 * c.width, lora["trainable"])

    long = groups["prefix", "text", 5e-2, 8]
    runs = [row for row in results["cells"] if row.get("steps") == 8]
    assert [row["seed"] for row in runs] == long["seeds"] == [0, 1]
    assert long["dev_loss"] == pytest.approx(sum(row["dev_loss"] for row in runs) / 2)
    assert long["dev_loss_sd"] == pytest.approx(abs(runs[0]["dev_loss"] - runs[1]["dev_loss"]) / 2**0.5)
    assert runs[0]["dev_loss_start"] == pytest.approx(runs[1]["dev_loss_start"])  # one set is held out for all seeds
    assert [row.get("bleu") is None for row in runs] == [False, True]

    (grid,) = make_grids(found.groups)
    (loud,) = (
        g for g in found.groups if g.method == "prefix" and g.cells == tuple(groups["prefix", "peft", 5e-2, 6]["cells"])
    )
    assert grid.rates == (2e-4, 5e-3, 5e-2)
    expected = f"{noise['dev_loss']:.3f} ({noise['dev_loss_start']:.2f}) D"
    assert [row for row in grid.texts() if row[0] == "peft"] == [["peft", expected, "", format_loss(loud)]]
    assert dict(grid.others) == {
        f"untrained {base['dev_loss']:.3f}": base["dev_loss"],
        f"LoRA {lora['dev_loss']:.3f}": lora["dev_loss"],
        f"{name_method('prompt')} {prompt['dev_loss']:.3f}": prompt["dev_loss"],
    }
    write_report(found, out)
    for report in ("report.md", "report.html"):
        said = (out / report).read_text()
        assert "Prefixes after 6 steps" in said
        assert (
            f"{long['dev_loss']:.3f} ± {long['dev_loss_sd']:.3f} over 2 seeds, {long['stored']:,} parameters stored"
            in said
        )
        assert expected in said


def group(method: str, dev_loss: float, sd: float | None = 0.01, **training) -> Group:
    seeds = (0, 1) if sd is not None else (0,)
    return Group("m", method, seeds, training=Training(dev_loss=dev_loss, **training), dev_loss_sd=sd)


def test_the_conclusion():
    noise = group("prefix", 9.0, init="peft", learning_rate=2e-4, stored=10, steps=9)
    text = group("prefix", 1.7, init="text", learning_rate=5e-3, stored=10, steps=9)
    lora = group("lora", 1.65, learning_rate=1e-3, stored=210, steps=9)
    base = group("zero-shot", 3.3, None, steps=0)
    results = Results("minipeft study", "prefix", Data("demo", 1, 1, "", ""), {}, (), (base, noise, text, lora))
    assert conclude(results) == [
        f"The best prefix after 9 steps is {name_method('prefix')} (text init, learning rate 0.005, 9 steps): "
        "1.700 ± 0.010 nats per held-out token.",
        "LoRA ends at 1.650 ± 0.010: the prefix is 0.050 nats above it and stores 21.0 times fewer parameters.",
        "A prefix with 'peft' init at learning rate 0.0002 ends at 9.000, worse than the untrained model's 3.300.",
    ]
    assert conclude(replace(results, preset="demo")) == []
    assert conclude(replace(results, groups=(base, lora))) == []


def test_a_grid_needs_two_inits_at_two_rates():
    groups = [
        group("prefix", 1.0, None, init=init, learning_rate=rate, steps=5)
        for init in ("text", "peft")
        for rate in (1e-3, 2e-3)
    ]
    assert make_grids(groups[:3]) == []
    assert make_grids([*groups[:3], replace(groups[3], error="failed")]) == []
    (found,) = make_grids(groups)
    assert found.texts() == [["init", "0.001", "0.002"], ["text", "1.000", "1.000"], ["peft", "1.000", "1.000"]]
    assert found.others == ()


def test_the_held_out_pairs_are_whole_and_apart(model, stories):
    """However short the training rows are, held-out pairs are not cut and are isolated."""
    tokenizer, base, pairs = load_tokenizer(model), load_model(model), load_pairs(str(stories))
    for kind in ("all", "response"):
        rows = pack_held_out(PackConfig(length=24, loss_mask=kind), base, tokenizer, encode_pairs(pairs, tokenizer))
        examples = encode_pairs(pairs, tokenizer)
        alone = [pack([e], tokenizer, length=len(e.ids), batch=1, loss_mask=kind)[0] for e in examples]
        whole = sum(len(example.ids) for example in examples)
        assert sum(int((row.documents >= 0).sum()) for row in rows) == whole
        assert evaluate(base, rows) == pytest.approx(evaluate(base, alone), rel=1e-5)
