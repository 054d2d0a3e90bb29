"""RunConfig: one table of settings for Python, JSON and flags; a setting that the method lacks is refused by name."""

import json

import pytest

from minipeft import InputError
from minipeft.adapters import METHODS, list_method_names
from minipeft.runs.config import RunConfig, collect_settings, measure_base, run_config, share_settings

DEMO = {"model": "demo", "data": "demo"}


@pytest.mark.parametrize("method", list_method_names())
def test_json_and_back(method: str) -> None:
    config = run_config(method, **DEMO, steps=6, learning_rate=0.5, lr_multiplier={"lora_B": 16.0})
    text = json.dumps(config.as_json())
    assert RunConfig.from_json(json.loads(text)) == config
    assert config.train.learning_rate == 0.5
    assert {name.replace("_", "-") for name in json.loads(text)} == {"method", *collect_settings(method)}


def test_lists_of_names_come_back_as_tuples() -> None:
    config = run_config("lora", **DEMO, targets=["c_attn", "c_proj"], layers=(0, 1), rank_pattern={"c_attn": 4})
    assert RunConfig.from_json(json.loads(json.dumps(config.as_json()))) == config
    assert config.adapter.targets == ("c_attn", "c_proj")


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_given_comes_from_the_recipe(method: str) -> None:
    config = run_config(method, **DEMO)
    parameters, family = measure_base(config.model)
    recipe = METHODS[method].recipe(config.adapter, parameters, family).settings()
    assert {name: getattr(config.train, name) for name in recipe} == recipe
    chosen = run_config(method, **DEMO, warmup=0.5, weight_decay=0.25)
    assert (chosen.train.warmup, chosen.train.weight_decay) == (0.5, 0.25)
    assert chosen.train.learning_rate == recipe["learning_rate"]


def test_the_base_may_be_told() -> None:
    """So that a study can be planned without reading a config.json for each cell."""
    large = run_config("lora", base=(7_000_000_000, "llama"), model="no/such-model", data="demo")
    assert large.train.learning_rate == 3e-4
    assert run_config("lora", base=(0, ""), model="no/such-model", data="demo").train.learning_rate == 1e-3


def test_change_keeps_the_rest() -> None:
    config = run_config("prefix", **DEMO, virtual_tokens=3, seed=5)
    changed = config.change(virtual_tokens=4)
    assert changed.adapter.length == 4
    assert changed.change(virtual_tokens=3) == config


@pytest.mark.parametrize(
    ("method", "chosen", "said"),
    [
        ("prefix", {"rank": 3}, "rank: has no effect with prefix (lora"),
        ("full", {"targets": ("nope",)}, "targets: has no effect with full (lora"),
        ("lora", {"gate": True}, "gate: has no effect with lora (prefix has it)"),
        ("lora", {"init": "banana"}, "init: 'banana' is not known (uniform, gaussian, orthogonal, pissa, olora)"),
        ("lora", {"learning_rat": 1}, "learning_rat: is not a setting of lora. Did you mean learning_rate?"),
        ("banana", {"learning_rate": 1e-3}, "method: 'banana' is not known (full, lora, dora, rslora, pissa, "),
        ("dora", {"dora": False}, "dora: False contradicts method dora"),
        ("prefix", {"virtual_tokens": 0}, "virtual_tokens: 0 must be an integer >= 1"),
        ("lora", {"learning_rate": True}, "learning_rate: True must be finite and > 0"),
        ("lora", {"seed": 1.5}, "seed: 1.5 must be an integer in [0, 2^63)"),
        ("lora", {"dtype": "int3"}, "dtype: 'int3' is not known (fp32, bf16)"),
    ],
)
def test_what_has_no_effect_is_refused(method: str, chosen: dict[str, object], said: str) -> None:
    with pytest.raises(InputError) as error:
        run_config(method, **DEMO, **chosen)
    assert str(error.value).startswith(said)


def test_pissa_by_its_init_is_pissa() -> None:
    assert run_config("lora", **DEMO, init="pissa") == run_config("pissa", **DEMO)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.pop("rank"), "run config: missing settings: rank"),
        (lambda data: data.pop("method"), "run config: must be an object with a method"),
        (lambda data: data.update(gate=True), "gate: has no effect with lora"),
        (lambda data: data.update(rank="8"), "rank: '8' must be an integer >= 1"),
    ],
)
def test_json_is_read_strictly(change: object, said: str) -> None:
    data = run_config("lora", **DEMO).as_json()
    change(data)  # type: ignore[operator]
    with pytest.raises(InputError, match=said):
        RunConfig.from_json(data)


def test_settings_are_shared_among_methods_that_have_them() -> None:
    each = share_settings(["full", "lora", "prefix"], {"rank": 3, "init": "text", "seed": 1})
    assert each == {"full": {"seed": 1}, "lora": {"rank": 3, "init": "text", "seed": 1},
                    "prefix": {"init": "text", "seed": 1}}  # fmt: skip
    with pytest.raises(InputError, match=r"gate: has no effect with full, lora \(prefix has it\)"):
        share_settings(["full", "lora"], {"gate": True})


def test_no_two_settings_of_a_method_have_one_flag() -> None:
    for method in METHODS:
        assert len(collect_settings(method)) > 20  # `settings` itself checks that they differ
