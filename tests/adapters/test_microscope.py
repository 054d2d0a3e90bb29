"""The microscope against torch's singular values of the update formed in float64, and faults that are planted."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from minipeft.adapters import IA3Config, LoRAConfig, PrefixConfig, PromptConfig, add_adapter
from minipeft.adapters.microscope import Update, describe_samples, examine
from minipeft.adapters.peft_format import load_adapter, save_adapter
from minipeft.cli import main
from minipeft.errors import InputError
from minipeft.models.checkpoint import load_model, save_model
from minipeft.runs import estimates, planning
from minipeft.runs.config import run_config
from minipeft.runs.finetune import finetune
from minipeft.training.loop import learning_rate_at
from tests.small import write_pairs, write_small_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_small_model(tmp_path_factory.mktemp("base") / "model", "llama", layers=4)


def adapted(base, folder, config, spread=0.3):
    """A saved adapter away from its init; returns the model that holds it."""
    model = load_model(base)
    add_adapter(model, config)
    draw = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(0, spread, generator=draw)
    save_adapter(model, folder)
    return model


@pytest.mark.parametrize(
    "config",
    [LoRAConfig(rank=3), LoRAConfig(rank=4, rslora=True), LoRAConfig(rank=2, alpha_pattern={"0.mlp.up_proj": 7.0}),
     LoRAConfig(rank=3, dora=True), IA3Config()],
)  # fmt: skip
def test_singular_values_are_those_of_the_update(base, tmp_path, config):
    model = adapted(base, tmp_path / "adapter", config)
    plain = isinstance(config, LoRAConfig) and not config.dora
    sources = (str(base), None) if plain else (str(base),)
    for source in sources:
        sample = examine(tmp_path / "adapter", source)
        assert len(sample.updates) == sum(hasattr(m, "merged") for m in model.modules())
        for update in sample.updates:
            layer = model.get_submodule(update.path)
            change = layer.merged()[0].double() - layer.weight.double()
            exact = torch.linalg.svdvals(change)
            found = torch.tensor(update.singular, dtype=torch.float64)
            assert torch.allclose(found, exact[: len(found)], atol=1e-5 * exact[0].item())
            assert (exact[len(found) :] < 1e-5 * exact[0]).all()
            assert update.norm == pytest.approx(change.norm().item(), rel=1e-4)
            share = (exact.square().cumsum(0) / exact.square().sum()).tolist()
            assert update.energy_rank == next(k for k, held in enumerate(share, 1) if held >= 0.9)
            if source is None:
                assert update.share is None
            else:
                assert update.share == pytest.approx((change.norm() / layer.weight.norm()).item(), rel=1e-4)


def test_virtual_tokens_are_tables_by_layer(base, tmp_path):
    model = adapted(base, tmp_path / "prefix", PrefixConfig(length=5, init="peft"))
    sample = examine(tmp_path / "prefix")
    assert [u.path for u in sample.updates[:3]] == ["layers.0.key", "layers.0.value", "layers.1.key"]
    key = model.blocks[0].self_attn.prefix.key  # [K, P, D]
    exact = torch.linalg.svdvals(key.detach().transpose(0, 1).flatten(1))
    assert sample.updates[0].singular == pytest.approx(exact.tolist(), rel=1e-5)
    adapted(base, tmp_path / "prompt", PromptConfig(length=5, init="normal"))
    assert [u.path for u in examine(tmp_path / "prompt").updates] == ["prompt"]


def test_dead_and_exploding_modules_are_named(base, tmp_path):
    adapted(base, tmp_path / "adapter", LoRAConfig(rank=3))
    assert examine(tmp_path / "adapter").find_faults() == {}
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.{}.mlp.up_proj.lora_B.weight"
    tensors[name.format(0)].zero_()
    tensors[name.format(1)].mul_(100)
    save_file(tensors, file)
    faults = examine(tmp_path / "adapter").find_faults()
    assert faults["model.layers.0.mlp.up_proj"] == "dead: the update is zero"
    assert faults["model.layers.1.mlp.up_proj"].startswith("exploding: |U|")
    assert len(faults) == 2
    assert "2 dead or exploding modules" in describe_samples([examine(tmp_path / "adapter")])[0]
    whole = examine(tmp_path / "adapter", str(base)).find_faults()  # W is random with 0.02: a share above 1 counts too
    assert faults.keys() <= whole.keys()


def test_a_full_tuned_model_is_its_difference_to_the_base(base, tmp_path):
    model = load_model(base)
    weight = model.blocks[1].mlp.up_proj.weight
    direction = torch.outer(torch.ones(weight.shape[0]), torch.arange(1.0, weight.shape[1] + 1))
    weight.data += direction
    save_model(model, tmp_path / "model")
    found = {u.path: u for u in examine(tmp_path / "model", str(base)).updates}
    tuned = found.pop("model.layers.1.mlp.up_proj")
    assert tuned.energy_rank == 1
    assert tuned.norm == pytest.approx(direction.norm().item(), rel=1e-5)
    assert {u.norm for u in found.values()} == {0.0}
    with pytest.raises(InputError, match="is a model: its update is the change of a base"):
        examine(tmp_path / "model")


def test_ranks():
    update = Update("model.layers.3.mlp.up_proj", (8, 8), (3.0, 1.0, 0.0))
    assert (update.energy_rank, update.layer, update.kind) == (1, 3, "mlp.up_proj")
    assert update.stable_rank == pytest.approx(10 / 9)
    assert Update("x", (2, 2), (0.0, 0.0)).energy_rank == 0


def test_the_page_shows_both_and_opens_without_a_network(base, tmp_path, capsys):
    adapted(base, tmp_path / "one", LoRAConfig(rank=3))
    adapted(base, tmp_path / "two", LoRAConfig(rank=8), 0.1)
    page = tmp_path / "page.html"
    words = [
        "inspect",
        str(tmp_path / "one"),
        str(tmp_path / "two"),
        "--model",
        str(base),
        "--html",
        "--out",
        str(page),
    ]
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(page)
    assert "one (lora): 28 updates, median rank for 90 % of the energy" in said.err
    text = page.read_text()
    assert text.count('<th scope="row">') == 56
    assert "In the 28 modules that both change, the rank for 90 % of the energy of two is" in text
    assert "http:" not in text
    assert "https:" not in text
    assert "default-src 'none'" in text


def test_the_page_says_how_far_a_run_moved_its_adapter(base, tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "probe_flops", lambda *_: 1e9)
    monkeypatch.setattr(planning, "count_step_bytes", lambda *_: 0)
    data = write_pairs(tmp_path / "pairs.jsonl", 8)
    given = {"model": str(base), "data": str(data), "steps": 3, "length": 64, "held_out": 2, "rank": 2, "seed": 7}
    config = run_config("lora", **given)
    finetune(config, tmp_path / "run", say=lambda _: None)
    fresh, tuned = load_model(base), load_model(base)
    add_adapter(fresh, config.adapter, seed=7)
    load_adapter(tuned, tmp_path / "run" / "adapter", trainable=True)
    pairs = [(p, dict(fresh.named_parameters())[name]) for name, p in tuned.named_parameters() if p.requires_grad]
    moved = torch.cat([(p - q).detach().abs().flatten() for p, q in pairs])
    budget = sum(learning_rate_at(step, config.train) for step in range(3))
    page = tmp_path / "page.html"
    assert main(["inspect", str(tmp_path / "run" / "adapter"), "--html", "--out", str(page)]) == 0
    assert moved.max() > 0
    said = f"run: moved from its init by {moved.mean():.3g} on average, by {moved.max():.3g} at most; "
    assert f"{said}the learning rates of its 3 steps sum to {budget:.3g}" in page.read_text()
    (tmp_path / "run" / "result.json").unlink()
    assert main(["inspect", str(tmp_path / "run" / "adapter"), "--html", "--out", str(page)]) == 0
    assert "moved from its init" not in page.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{one}", "--model", "demo"], "--model: is for the page alone. Add --html"),
        (["{one}", "{one}"], "OTHER: is for the page alone. Add --html"),
        (["{base}", "--html", "--out", "{out}"], "is a model: its update is the change of a base. Give --model BASE"),
        (["{dora}", "--html", "--out", "{out}"], "use_dora is on, and its update needs the base. Give --model BASE"),
        (["{empty}", "--html", "--out", "{out}"], "holds neither adapter_config.json nor config.json"),
    ],
)
def test_what_cannot_be_measured_is_refused(base, tmp_path, capsys, words, said):
    adapted(base, tmp_path / "one", LoRAConfig(rank=2))
    adapted(base, tmp_path / "dora", LoRAConfig(rank=2, dora=True))
    (tmp_path / "empty").mkdir()
    names = {"base": base, "out": tmp_path / "page.html", **{n: tmp_path / n for n in ("one", "dora", "empty")}}
    assert main(["inspect", *(word.format(**names) for word in words)]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
