"""The prefix experiment in small: on stories260K, a few steps a cell."""

import dataclasses
import json

import pytest
import torch

from minipeft.data.packing import rows_of_one
from minipeft.data.pairs import Pair, Pairs, encode_pairs
from minipeft.data.tokens import load_tokenizer
from minipeft.errors import InputError
from minipeft.models.checkpoint import load_model
from minipeft.study import prefix_experiment as experiment
from minipeft.study.prefix_experiment import Cell, Data
from minipeft.training.loop import TrainConfig, evaluate
from minipeft.tuning import TuneConfig


@pytest.fixture
def model(assets):
    return load_model(assets / "fixtures" / "stories260K", dtype=torch.float32)


@pytest.fixture
def data(assets) -> Data:
    tokenizer = load_tokenizer(assets / "fixtures" / "stories260K")
    names = ["Lily", "Tom", "Sue", "Ben", "Mia", "Max"]
    items = [Pair(f"a story of {a} and {b}", f"{a} met {b}. {b} ran.") for a in names for b in names]
    return Data.split(Pairs(tuple(items), "here", "0" * 64), tokenizer, held_out=8)


def test_the_grid_is_what_it_says():
    cells = experiment.grid()
    prefixes = {(c.init, c.learning_rate, bool(c.reparam)) for c in cells if c.method == "prefix"}
    wanted = {(i, r, m) for i in ("peft", "normal", "text") for r in (2e-4, 1e-3, 5e-3, 3e-2) for m in (False, True)}
    assert prefixes == wanted
    others = [(c.method, c.learning_rate, c.init) for c in cells if c.method != "prefix"]
    assert sorted(others, key=str) == [("lora", 0.0003, None), ("lora", 0.001, None), ("prompt", 0.03, "text")]
    assert len({c.name for c in cells}) == len(cells) == 27
    long = experiment.long_runs()
    assert len({c.name for c in long} - {c.name for c in cells}) == len(long) == 15
    fields = {field.name for field in dataclasses.fields(TuneConfig)}
    for cell in (*cells, *long):
        assert cell.tuning().keys() <= fields
        TuneConfig(model="m", data="d", **cell.tuning())  # type: ignore[arg-type]


def test_a_step_is_its_examples_side_by_side(model, data, monkeypatch):
    """The same loss and number of tokens as rows of one example with padding, and every pair once an epoch."""
    cell = Cell("lora", 1e-3, examples=5)
    side = data.batches(cell, 0, 512)
    seen = []
    for i in range(len(side.rows)):
        batch, rows = side[i], side.rows[i]
        assert batch.ids.shape[0] == 1
        assert (batch.documents >= 0).all()
        assert batch.ids.shape[1] == (rows.documents >= 0).sum()
        assert evaluate(model, [batch]) == pytest.approx(evaluate(model, [rows]), rel=1e-5)
        seen += [tuple(row[owner >= 0].tolist()) for row, owner in zip(rows.ids, rows.documents)]
    assert len(seen) == len(set(seen)) == len(data.train)


def test_the_development_loss_is_evaluates(model, data):
    loss, response = data.dev_loss(model)
    for found, kind in ((loss, "all"), (response, "response")):
        rows = rows_of_one(encode_pairs(data.dev, data.tokenizer), data.tokenizer, length=512, batch=3, loss=kind)
        assert found == pytest.approx(evaluate(model, list(rows)), rel=1e-5)


def test_cells_are_run_once_and_leave_the_model_plain(model, data, tmp_path, monkeypatch):
    cells = [
        Cell("prefix", 2e-4, "peft", steps=6),
        Cell("prefix", 5e-2, "text", steps=6),
        Cell("prefix", 5e-3, "text", 32, steps=6),
        Cell("prompt", 3e-2, "text", steps=6),
        Cell("lora", 1e-2, steps=6),
    ]
    before = repr(model)
    rows = list(experiment.run(model, data, cells[:2], tmp_path))
    assert repr(model) == before
    ran = []
    plain = experiment.run_cell
    monkeypatch.setattr(
        experiment, "run_cell", lambda m, d, cell, starts: ran.append(cell) or plain(m, d, cell, starts)
    )
    again = list(experiment.run(model, data, cells, tmp_path))
    assert ran == cells[2:]
    assert again[:2] == json.loads(json.dumps(rows))
    noise, text, network, prompt, lora = again
    assert noise["dev_loss_start"] > text["dev_loss_start"] + 1
    assert text["dev_loss_start"] == pytest.approx(network["dev_loss_start"], rel=1e-6)
    assert text["dev_loss_start"] == pytest.approx(prompt["dev_loss_start"], rel=1e-5)  # the free check: one text
    for row in (text, network, prompt, lora):
        assert row["dev_loss"] < row["dev_loss_start"] - 0.1
    assert any(w.startswith("dead adapter") for w in noise["adapter_movement"]["warnings"])
    assert noise["adapter_movement"]["largest"] <= 1.5 * noise["adapter_movement"]["budget"]
    assert not any(w.startswith("dead adapter") for w in text["adapter_movement"]["warnings"])
    for row in (noise, text):  # of a plain table the columns are what is trained
        assert row["columns_moved"] == pytest.approx(row["adapter_movement"]["largest"])
    assert network["columns_moved"] > 2 * network["adapter_movement"]["largest"]
    assert lora["columns_moved"] is None
    c = model.config
    assert text["stored"] == network["stored"] == text["trainable"] == 20 * c.layers * 2 * c.kv_heads * c.head_width
    assert network["trainable"] > network["stored"]
    assert (prompt["stored"], lora["stored"]) == (20 * c.width, lora["trainable"])
    base = experiment.base_row(model, data, tmp_path)
    assert base["dev_loss"] == data.dev_loss(model)[0]
    assert experiment.base_row(None, None, tmp_path) == base  # measured once
    about = {"command": "c", "model": "m", "dev_pairs": 8, "base": base}
    results = experiment.collect(tmp_path, about)
    assert [row["dev_loss"] for row in results["cells"]] == sorted(row["dev_loss"] for row in again)
    said = experiment.as_markdown(results)
    assert f"{noise['dev_loss']:.3f} ({noise['dev_loss_start']:.2f}) D" in said
    assert "| text + MLP | not run" in said


def test_another_cells_file_is_refused(model, data, tmp_path):
    cell = Cell("lora", 1e-2, steps=2)
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / f"{cell.name}.json").write_text('{"method": "prefix"}')
    with pytest.raises(InputError, match="is another cell's row"):
        list(experiment.run(model, data, [cell], tmp_path))


def test_only_its_own_methods():
    with pytest.raises(InputError, match=r"'full' is no part of this experiment \(prefix, prompt, lora\)"):
        Cell("full", 1e-5).adapter()
    assert Cell("lora", 1e-3).training() == TrainConfig(steps=60, learning_rate=1e-3, warmup=0.1)
