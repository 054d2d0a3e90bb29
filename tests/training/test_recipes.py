"""The default settings: each fits TrainConfig, and the rates are those of their sources."""

import dataclasses

import pytest

from minipeft.errors import InputError
from minipeft.training.loop import TrainConfig
from minipeft.training.recipes import recipe


@pytest.mark.parametrize("method", ["full", "lora", "prefix", "prompt"])
@pytest.mark.parametrize("parameters", [124_439_808, 1_557_611_200, 7_241_732_096])
def test_settings_are_those_of_a_run(method: str, parameters: int) -> None:
    given = recipe(method, parameters=parameters)
    config = TrainConfig(steps=10, **given.settings())  # type: ignore[arg-type]
    fields = {f.name for f in dataclasses.fields(TrainConfig)}
    for name, value in dataclasses.asdict(given).items():
        assert (getattr(config, name) == value) if name in fields else name in ("epochs", "examples", "source")
    assert given.source
    assert (given.weight_decay > 0) == (method == "full" and parameters < 2e9)


def test_rates() -> None:
    assert recipe("lora", parameters=135_000_000).learning_rate == 1e-3
    assert recipe("lora", parameters=7_000_000_000).learning_rate == 3e-4
    assert recipe("full", parameters=7_000_000_000, family="llama").learning_rate == 1e-5
    assert recipe("full", parameters=7_000_000_000, family="mistral").learning_rate == 3e-6
    rates = [recipe("prefix", init=i, reparam=r).learning_rate for i, r in (("text", 0), ("text", 1), ("peft", 0))]
    assert rates == [3e-2, 1e-3, 3e-2]
    assert recipe("prompt").learning_rate == 3e-2


def test_unknown_method() -> None:
    with pytest.raises(InputError, match=r"'ia3' is not known \(full, lora, prefix, prompt\)"):
        recipe("ia3")
