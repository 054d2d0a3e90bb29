"""Configs of families whose layers differ: some have a sliding window, and may have their own rotary setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from minipeft.errors import InputError, option
from minipeft.models.config import count
from minipeft.models.llama import LlamaConfig
from minipeft.models.rotary import Rope

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class LayeredConfig(LlamaConfig):
    """Llama's fields, and a window on the layers of type SLIDING: given by `layer_types`, else by `slides`."""

    sliding_window: int | None = count(4096)  # tokens; None: all
    layer_types: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        types = self.layer_types
        if types is not None and (len(types) != self.layers or not set(types) <= {FULL, SLIDING}):
            raise InputError(f"must be {self.layers} of {FULL!r} and {SLIDING!r}", where="layer_types")

    def slides(self, layer: int) -> bool:
        """Whether this layer has the window, if the file does not say."""
        return True

    def layer_type(self, layer: int) -> str:
        if self.layer_types is not None:
            return self.layer_types[layer]
        return SLIDING if self.slides(layer) else FULL

    def window(self, layer: int) -> int | None:
        return self.sliding_window if self.layer_type(layer) == SLIDING else None

    def to_json(self) -> dict[str, object]:
        types = {} if "layer_types" in self.fixed else {"layer_types": [self.layer_type(i) for i in range(self.layers)]}
        return {**super().to_json(), **types}


@dataclass(frozen=True)
class TwoRopesConfig(LayeredConfig):
    """A rotary setting with scaling for the full layers, and an unscaled one for the sliding layers."""

    rope_local_base_freq: float = option(10000.0, above=0)

    def rope(self, layer: int) -> str | None:
        return self.layer_type(layer)

    def ropes(self) -> dict[str, Rope]:
        return {FULL: super().ropes()["default"], SLIDING: Rope(float(self.rope_local_base_freq), self.context)}

    @classmethod
    def from_json(cls, given: Mapping[str, object]) -> dict[str, object]:
        """As Llama; transformers 5 writes rope_parameters {"full_attention": {...}, "sliding_attention": {...}}."""
        nested = given.get("rope_parameters") or {}
        if not isinstance(nested, dict) or not set(nested) <= {FULL, SLIDING}:
            problem = f"must hold {FULL!r} and {SLIDING!r}: transformers ignores settings that are for all layers"
            raise InputError(problem, where="rope_parameters")
        full, local = (nested.get(name) or {} for name in (FULL, SLIDING))
        if not isinstance(full, dict) or not isinstance(local, dict):
            raise InputError("must hold objects", where="rope_parameters")
        if local.get("rope_type", "default") != "default":
            raise InputError(f"{local['rope_type']!r} is not supported (default)", where=f"rope_parameters.{SLIDING}")
        fields = super().from_json({**given, "rope_parameters": full})
        if (theta := local.get("rope_theta", given.get("rope_local_base_freq"))) is not None:
            fields["rope_local_base_freq"] = theta
        return fields

    def to_json(self) -> dict[str, object]:
        fields = super().to_json()
        local = {"rope_type": "default", "rope_theta": self.rope_local_base_freq}
        return {**fields, "rope_parameters": {FULL: fields["rope_parameters"], SLIDING: local}}
