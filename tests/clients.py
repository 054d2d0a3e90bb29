"""What clients that cannot run here read of an adapter's folder: llama.cpp's converter, and vLLM's loader.

Both are repeated from their sources, and compute the update of each linear that the client would apply, or refuse.
"""

import importlib.util
import json
import math
import re
import sys
import types
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ROOT = "base_model.model."


class Refused(Exception):
    """The client ends with an error."""


def convert(folder: Path, architecture: str, layers: int) -> tuple[float, dict[str, Tensor]]:
    """alpha and the tensors under llama.cpp's names, as its convert_lora_to_gguf.py (2026) makes them of a PEFT folder.

    `base_model.model.`, `.lora_A` and `.lora_B` are left out, alpha is lora_alpha alone, the base's own tables are
    skipped, and any other tensor is refused. llama.cpp computes W x + (alpha / rank) B A x, rank the rows of A.
    """
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], layers)
    given = json.loads((folder / CONFIG).read_text())
    found = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        if name.endswith(".base_layer.weight"):
            continue
        match = re.fullmatch(r"(.*)\.lora_(?:embedding_)?([AB])(?:\.weight)?", name)
        if match is None or "lora_alpha" not in given:
            raise Refused(name)
        base = match[1].removeprefix(ROOT) + ".weight"
        mapped = names.get_name(base, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            raise Refused(base)
        transposed = mapped == "token_embd.weight" and match[2] == "A"
        found[f"{mapped}.lora_{match[2].lower()}"] = tensor.T if transposed else tensor
    return float(given["lora_alpha"]), found


def read_by_llama_cpp(folder: Path, layers: int) -> dict[str, Tensor]:
    """The update of each module's weight, by the module's path in transformers' Llama."""
    import gguf

    alpha, tensors = convert(folder, "LLAMA", layers)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    paths = {names.get_name(f"{path}.weight", try_suffixes=(".weight",)): path for path in list_paths(layers)}
    updates = {}
    for name in (name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")):
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        if name == "token_embd.weight":
            updates[paths[name]] = alpha / A.shape[1] * (A @ B.T)  # [V, C]
        else:
            updates[paths[name]] = alpha / A.shape[0] * (B @ A)  # [out, in]
    return updates


def list_paths(layers: int) -> list[str]:
    """The paths of a Llama's linears and tables."""
    linears = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    blocks = [f"model.layers.{layer}.{linear}" for layer in range(layers) for linear in linears]
    return ["model.embed_tokens", *blocks, "lm_head"]


def read_by_vllm(folder: Path) -> dict[str, Tensor]:
    """The update of each module's weight, as vLLM 0.33.0 reads it (vllm/lora/peft_helper.py, utils.py, lora_model.py).

    vLLM itself cannot run here. It refuses a file without r, lora_alpha and target_modules, what `refuse_features`
    lists, and a tensor that is neither lora_A nor lora_B; patterns and rsLoRA give each module its own scale.
    """
    given = json.loads((folder / CONFIG).read_text())
    if missing := {"r", "lora_alpha", "target_modules"} - given.keys():
        raise Refused(f"missing {missing}")
    refuse_features(given)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        if name.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
            continue
        match = re.fullmatch(r"base_model\.model\.(.*)\.(?:lora_([AB])\.weight|lora_embedding_([AB]))", name)
        if match is None:
            raise Refused(name)
        pairs.setdefault(match[1], {})[match[2] or match[3]] = tensor
    updates = {path: scale_in_vllm(given, path) * (pair["B"] @ pair["A"]) for path, pair in pairs.items()}
    return {path: update.T if path.endswith("embed_tokens") else update for path, update in updates.items()}


def refuse_features(given: dict[str, Any]) -> None:
    """Refuse what vLLM's PEFTHelper refuses by name."""
    refused = ["use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora"]
    asked = [key for key in refused if given.get(key)]
    asked += [name for name in given.get("modules_to_save") or [] if name not in ("classifier", "score")]
    init = given.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in ("gaussian", "eva", "orthogonal", "mica", "lora_ga"):
        asked.append(init)
    if given.get("bias", "none") != "none":
        asked.append("bias")
    if asked:
        raise Refused(", ".join(asked))


def scale_in_vllm(given: dict[str, Any], path: str) -> float:
    """alpha / r or alpha / sqrt(r), with the first pattern that matches the end of the path."""

    def of(pattern: dict[str, float] | None, default: float) -> float:
        found = (value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", path))
        return next(found, default)

    rank, alpha = of(given.get("rank_pattern"), given["r"]), of(given.get("alpha_pattern"), given["lora_alpha"])
    return alpha / (math.sqrt(rank) if given.get("use_rslora") else rank)


def load_vllms_own_helper() -> Any:
    """vLLM's PEFTHelper, loaded alone from an installed or unpacked vLLM; None where there is none."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.submodule_search_locations is None:
        return None
    for name in ("vllm.config.lora", "vllm.logger"):  # what the file imports beside the standard library
        sys.modules[name] = types.ModuleType(name)
    sys.modules["vllm.config.lora"].LoRAConfig = object  # type: ignore[attr-defined]
    silent = types.SimpleNamespace(info_once=lambda *_: None)
    sys.modules["vllm.logger"].init_logger = lambda _: silent  # type: ignore[attr-defined]
    file = Path(spec.submodule_search_locations[0]) / "lora" / "peft_helper.py"
    found = importlib.util.spec_from_file_location("peft_helper", file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["peft_helper"] = module
    found.loader.exec_module(module)
    return module.PEFTHelper
