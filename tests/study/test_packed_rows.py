"""The report's explorer: the rows that were trained on, and losses against each document by itself."""

import html
import json
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minipeft.adapters.peft_format import load_adapter
from minipeft.data.tokens import load_tokenizer
from minipeft.generation import GenerateConfig
from minipeft.models.checkpoint import load_model
from minipeft.runs import finetune
from minipeft.study import drafts, packed_rows, report
from minipeft.study.packed_rows import draw_packed_rows
from minipeft.study.presets import StudyConfig
from minipeft.study.report import name_cells, write_report
from minipeft.study.results import assemble
from minipeft.study.runner import conduct
from tests.study.inside import patch

VIRTUAL, LENGTH = 5, 128


@pytest.fixture(scope="module")
def study(model, pairs, tmp_path_factory):
    """A study of LoRA and a prefix: its folder, results, and the first batch that each cell was trained on."""
    out, given, train = tmp_path_factory.mktemp("studies") / "s", [], finetune.train
    settings = {"steps": 1, "length": LENGTH, "virtual_tokens": VIRTUAL, "loss_mask": "response"}
    record = lambda model, batches, *rest: given.append(batches) or train(model, batches, *rest)
    config = StudyConfig(model=(str(model),), data=str(pairs), method=("lora", "prefix"), limit=1, settings=settings)
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch(monkeypatch.setattr)
        monkeypatch.setattr(drafts, "make_generate_config", lambda config, seed: GenerateConfig(max_new_tokens=2))
        monkeypatch.setattr(report, "draw_packed_rows", draw_packed_rows)
        monkeypatch.setattr(finetune, "train", record)
        outcomes = conduct(config, out, say=lambda line: None)
        results = assemble(outcomes, config, out, "minipeft study")
        write_report(results, out)
    return out, results, given


def read_explorers(page: str):
    """Of each explorer of a page: its data, its tokens, and its losses."""
    for part in page.split('<div class="explorer" data-explorer="')[1:]:
        data = json.loads(html.unescape(part[: part.index('"')]))
        tokens = [html.unescape(text) for text in re.findall(r'role="option"[^>]*>(.*?)</b>', part)]
        losses = re.findall(r'<li data-loss="(\w+)/(\w+)">[^<]*<span class="n">([\d.]+)</span>', part)
        yield data, tokens, {(packing, prefix): float(loss) for packing, prefix, loss in losses}


def test_the_page_shows_the_rows_that_the_prefix_was_trained_on(study, model):
    out, _, given = study
    explorers = list(read_explorers((out / "report.html").read_text()))
    assert len(explorers) == 3
    (batches,) = (one for one in given if one.width == LENGTH - VIRTUAL)
    tokenizer = load_tokenizer(model)
    assert batches.batch == 1
    for number, (data, tokens, _) in enumerate(explorers):
        batch = batches[number]
        assert data["owners"] == batch.documents[0].tolist()
        assert data["virtual"] == VIRTUAL
        kept = [i for i, owner in zip(batch.ids[0].tolist(), data["owners"]) if owner >= 0]
        words = [tokenizer.decode([i], skip_special=False) for i in kept]
        assert tokens[: len(words)] == [word.replace(" ", "·").replace("\n", "↵") for word in words]
        assert set(tokens[len(words) :]) <= {"."}


@torch.no_grad()
def test_the_losses_are_those_of_each_document_by_itself_and_of_the_row_as_one(study, model):
    out, _, given = study
    (batches,) = (one for one in given if one.width == LENGTH - VIRTUAL)
    base, tuned = load_model(model, dtype=torch.float32).eval(), load_model(model, dtype=torch.float32).eval()
    load_adapter(tuned, next((out / "cells").glob("*prefix*")) / "run" / "adapter")

    def nats(model, ids, labels) -> list[float]:
        """-log p of each supervised token."""
        logs = F.log_softmax(model.logits(model.hidden(ids[None]))[0], dim=-1)  # [T, V]
        return [-logs[t - 1, ids[t]].item() for t in range(1, len(ids)) if labels[t] >= 0]

    shown = list(read_explorers((out / "report.html").read_text()))
    assert any(("naive", "prefix") in losses for _, _, losses in shown)
    for number, (_, _, losses) in enumerate(shown):
        ids, labels, owners = (tensor[0] for tensor in vars(batches[number]).values())
        several = len(set(owners.tolist()) - {-1}) > 1
        assert set(losses) == {(p, q) for p in ("rule", "naive")[: 1 + several] for q in ("none", "prefix")}
        for prefix, tried in (("none", base), ("prefix", tuned)):
            alone = [v for o in set(owners.tolist()) - {-1} for v in nats(tried, ids[owners == o], labels[owners == o])]
            assert losses["rule", prefix] == pytest.approx(sum(alone) / len(alone), abs=2e-4)
            if several:
                joined = nats(tried, ids[owners >= 0], labels[owners >= 0])
                assert losses["naive", prefix] == pytest.approx(sum(joined) / len(joined), abs=2e-4)
                assert losses["naive", prefix] != losses["rule", prefix]


def test_the_page_is_written_again_with_the_same_explorer(study):
    out, results, _ = study
    before = (out / "report.html").read_text()
    (out / "report.html").unlink()
    write_report(results, out)
    assert (out / "report.html").read_text() == before
    assert before.count("<script>") == 1
    assert "Packed rows</h2>" in before
    assert "prefix-tuning: the first 3 rows of its training, as packed." in before


def test_losses_that_take_long_are_not_shown(study, monkeypatch):
    out, results, _ = study
    monkeypatch.setattr(packed_rows, "MOST_MEASURED", 1000)
    body, caption = draw_packed_rows(results, out, name_cells(results))
    assert [losses for _, _, losses in read_explorers(body)] == [{}, {}, {}]
    assert "nats" not in body + caption


def test_a_large_data_set_and_a_study_without_training_show_no_rows(study, monkeypatch):
    out, results, _ = study
    untrained = replace(results, cells=tuple(row for row in results.cells if not row.training.steps))
    assert draw_packed_rows(untrained, out, name_cells(results)) == ("", "")
    monkeypatch.setattr(packed_rows, "MOST_PAIRS", 3)
    assert draw_packed_rows(results, out, name_cells(results)) == ("", "")


def test_a_model_that_is_gone_is_named(study, monkeypatch):
    out, results, _ = study
    cell = packed_rows.choose_cell(results, out, name_cells(results))
    gone = replace(cell, run=replace(cell.run, model=replace(cell.run.model, source=str(out / "gone"))))
    monkeypatch.setattr(packed_rows, "choose_cell", lambda *_: gone)
    body, _ = draw_packed_rows(results, out, name_cells(results))
    assert body.startswith("<p>The rows cannot be packed again: ")
    assert "gone" in body


def test_lora_has_no_prefix_to_switch_on(study):
    out, results, _ = study
    only = replace(results, cells=tuple(row for row in results.cells if row.method != "prefix"))
    body, caption = draw_packed_rows(only, out, name_cells(results))
    assert caption.startswith("LoRA: the first 3 rows")
    assert 'name="prefix"' not in body
    assert 'name="packing"' in body
    assert all(data["virtual"] == 0 for data, _, _ in read_explorers(body))
