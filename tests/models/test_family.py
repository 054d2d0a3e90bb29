"""Each family's record against its module: the names of its parts, the default targets, the transposed weights."""

import pytest
from torch import nn

from minipeft.models import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_the_record_names_what_the_module_has(twins, family):
    model = twins(family)[0]
    record = FAMILIES[family]
    assert model.family is record
    assert isinstance(model, record.decoder)
    assert isinstance(model.config, record.config)
    assert record.name == family == model.config.model_type
    assert isinstance(model.embedding, nn.Embedding)
    assert len(model.blocks) == getattr(model.config, record.layers_field)
    assert model.norm.weight.shape == (model.config.width,)
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    for targets in record.default_targets.values():
        assert all(any(name.endswith("." + target) for name in linears) for target in targets)
    assert all(any(f"{name}.weight".endswith(ending) for name in linears) for ending in record.transposed)
