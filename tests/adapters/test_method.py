"""The records of the methods: names, presets, and the recipes with the numbers of their sources."""

import dataclasses

import pytest

from minipeft.adapters import (
    METHODS,
    FullConfig,
    IA3Config,
    LoRAConfig,
    PrefixConfig,
    PromptConfig,
    find_method,
    get_method,
    list_method_names,
    make_adapter_config,
)
from minipeft.errors import InputError
from minipeft.training.loop import TrainConfig


def recipe_of(config, parameters=0, family=""):
    return find_method(config).recipe(config, parameters, family)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("parameters", [124_439_808, 1_557_611_200, 7_241_732_096])
def test_settings_are_those_of_a_run(method: str, parameters: int) -> None:
    given = METHODS[method].recipe(make_adapter_config(method), parameters, "")
    config = TrainConfig(steps=10, **given.settings())  # type: ignore[arg-type]
    fields = {f.name for f in dataclasses.fields(TrainConfig)}
    for name, value in dataclasses.asdict(given).items():
        assert (getattr(config, name) == value) if name in fields else name == "source"
    assert given.source
    assert (given.weight_decay > 0) == (method == "full" and parameters < 2e9)


def test_learning_rates() -> None:
    assert recipe_of(LoRAConfig(), 135_000_000).learning_rate == 1e-3
    assert recipe_of(LoRAConfig(), 7_000_000_000).learning_rate == 3e-4
    assert recipe_of(FullConfig(), 7_000_000_000, "llama").learning_rate == 1e-5
    assert recipe_of(FullConfig(), 7_000_000_000, "mistral").learning_rate == 3e-6
    prefixes = [PrefixConfig(init=i, reparam=r) for i, r in (("text", None), ("text", 512), ("peft", None))]
    assert [recipe_of(config).learning_rate for config in prefixes] == [3e-2, 1e-3, 3e-2]
    assert recipe_of(PrefixConfig(gate=True)).learning_rate == 5e-3
    assert recipe_of(PromptConfig()).learning_rate == 3e-2
    assert recipe_of(PromptConfig(reparam=8)).learning_rate == 1e-3
    assert recipe_of(IA3Config()).learning_rate == 3e-3


def test_each_name_makes_the_config_of_its_method() -> None:
    assert make_adapter_config("dora", rank=4) == LoRAConfig(4, dora=True)
    assert make_adapter_config("rslora") == LoRAConfig(rslora=True)
    assert make_adapter_config("pissa") == LoRAConfig(init="pissa")
    assert make_adapter_config("prefix", length=3, gate=True) == PrefixConfig(3, gate=True)
    assert make_adapter_config("full") == FullConfig()
    for name in list_method_names():
        method, preset = get_method(name)
        config = make_adapter_config(name)
        assert find_method(config) is method
        assert all(getattr(config, key) == value for key, value in preset.items())


@pytest.mark.parametrize(
    ("name", "chosen", "text"),
    [
        ("banana", {}, r"method: 'banana' is not known \(full, lora, dora, rslora, pissa, ia3, prefix, prompt"),
        ("prefix", {"rank": 3}, r"rank: method prefix has no such setting \(it has: length, init, text, reparam, "),
        ("full", {"targets": "nope"}, r"targets: method full has no such setting \(it has: none\)"),
        ("dora", {"dora": False}, "dora: False contradicts method dora"),
        ("lora", {"init": "banana"}, r"init: 'banana' is not known \(uniform, gaussian, orthogonal, pissa, olora\)"),
    ],
)
def test_what_a_method_does_not_have_is_refused(name: str, chosen: dict[str, object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        make_adapter_config(name, **chosen)


def test_no_other_object_is_a_config() -> None:
    for config in (None, "lora", TrainConfig(1), LoRAConfig):
        with pytest.raises(InputError, match=r"is not an adapter's config \(FullConfig, LoRAConfig, "):
            find_method(config)
