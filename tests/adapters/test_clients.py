"""docs/clients.md: what each client makes of each adapter's folder. `.venv/bin/python -m tests.adapters.test_clients`
writes the page; the test fails if a client does anything else than the page says."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import minipeft
from minipeft.adapters import IA3Config, LNTuningConfig, LoRAConfig, PrefixConfig, PromptConfig, VeRAConfig, add_adapter
from minipeft.adapters.embedding import LoRAEmbedding
from minipeft.adapters.lora import find_all_layers
from minipeft.models import FAMILIES
from minipeft.models.checkpoint import load_model, save_model
from tests import clients
from tests.clients import Refused

pytest.importorskip("gguf", reason="the gguf package is not installed (README, The tests)")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "clients.md"
LLAMA = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 96, "attention_bias": True, "mlp_bias": True}  # fmt: skip
PATTERNS = {"rank_pattern": {"k_proj": 5}, "alpha_pattern": {"0.self_attn.v_proj": 2.0}}
lora = lambda **given: LoRAConfig(**{"rank": 4, "alpha": 6.0} | given)
ADAPTERS: dict[str, tuple[Any, bool]] = {  # the config, and whether it is saved with baked=True
    "LoRA": (lora(), False),
    "rsLoRA": (lora(rslora=True), False),
    "rsLoRA, baked": (lora(rslora=True), True),
    "rank_pattern, alpha_pattern": (lora(**PATTERNS), False),
    "rank_pattern, alpha_pattern, baked": (lora(**PATTERNS), True),
    "rsLoRA and patterns, baked": (lora(rslora=True, **PATTERNS), True),
    "DoRA": (lora(dora=True), False),
    "PiSSA": (lora(init="pissa"), False),
    "OLoRA": (lora(init="olora"), False),
    "lora_bias": (lora(lora_bias=True), False),
    "LoRA on embedding and head": (lora(targets=("q_proj", "embed_tokens", "lm_head")), False),
    "modules_to_save": (lora(modules_to_save=("lm_head",)), False),
    "bias": (lora(bias="all"), False),
    "trainable_token_indices": (lora(trainable_token_indices=(3, 7)), False),
    "(IA)3": (IA3Config(), False),
    "VeRA": (VeRAConfig(8), False),
    "LN-tuning": (LNTuningConfig(), False),
    "prefix": (PrefixConfig(3, init="peft"), False),
    "gated prefix": (PrefixConfig(3, init="peft", gate=True), False),
    "prompt": (PromptConfig(3, init="vocab"), False),
}
CLIENTS = ("PEFT", "transformers", "llama.cpp", "vLLM")
HEAD = """# Which clients read which adapters

`tests/adapters/test_clients.py` writes this table, and fails where a client does anything else. The adapters are
random, on a tiny random Llama.

| outcome | means |
|---|---|
| same | the same logits, or for llama.cpp and vLLM the same update of every weight, to rounding |
| refused | the client ends with an error |
| **wrong** | another result, without an error |

PEFT {peft} and transformers {transformers} (`model.load_adapter`) are run. llama.cpp's converter and vLLM are **not
run**: what `convert_lora_to_gguf.py` does is repeated from its source with the `gguf` package's table of names, and the
rules of vLLM 0.33.0 from its `vllm/lora/` (`tests/clients.py`); where a vLLM is on the path, the test compares
them with vLLM's own `PEFTHelper`. Both clients read LoRA alone. transformers leaves the magnitudes of a DoRA file at
their init, also those of a file that PEFT wrote; its load report lists them as missing. For a client that misreads an
adapter, merge it: `merge_adapter`, `save_model`.

"""


def make() -> tuple[Any, Tensor]:
    """A random Llama, and ids for it."""
    generator = torch.Generator().manual_seed(0)
    model = FAMILIES["llama"].decoder(FAMILIES["llama"].config(**LLAMA)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.25, generator=generator)
    return model, torch.randint(0, 61, (2, 20), generator=generator)


def save(folder: Path, config: Any, baked: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """An adapter away from its init, saved: its logits, and the update of each weight where there is one."""
    model, ids = make()
    add_adapter(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
        logits = model(ids)
    minipeft.save_adapter(model, folder, baked=baked)
    updates = {}
    if isinstance(config, LoRAConfig):
        for path, layer in find_all_layers(model).items():
            if isinstance(layer, LoRAEmbedding):
                updates[path] = layer.scale * (layer.lora_embedding_B @ layer.lora_embedding_A).T
            elif hasattr(layer, "part"):
                _, _, A, B, scale = layer.part()
                updates[path] = scale * (B @ A)
    return logits, updates


def near(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= 1e-4 * ours.abs().max())


def outcome(client: str, base: Path, folder: Path, wanted: Tensor, updates: dict[str, Tensor]) -> str:
    """What a client makes of a folder."""
    ids = make()[1]
    try:
        if client in ("llama.cpp", "vLLM"):
            read = clients.read_by_vllm(folder) if client == "vLLM" else clients.read_by_llama_cpp(folder, 2)
            same = read.keys() == updates.keys() and all(near(updates[path], read[path]) for path in updates)
        else:
            peer = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
            with torch.no_grad():
                if client == "PEFT":
                    got = peft.PeftModel.from_pretrained(peer, folder).eval()(ids).logits
                else:
                    peer.load_adapter(folder)
                    got = peer.eval()(ids).logits
            same = near(wanted, got[:, -wanted.shape[1] :])  # PEFT returns logits of a prompt too
    except (Refused, ValueError, KeyError):
        return "refused"
    return "same" if same else "**wrong**"


def write_table(folder: Path) -> str:
    """The page."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    save_model(make()[0], folder / "base")
    lines = [f"| adapter | {' | '.join(CLIENTS)} |", "|---|" + "---|" * len(CLIENTS)]
    for number, (name, (config, baked)) in enumerate(ADAPTERS.items()):
        made = folder / str(number)
        wanted, updates = save(made, config, baked)
        found = [outcome(client, folder / "base", made, wanted, updates) for client in CLIENTS]
        lines.append(f"| {name} | {' | '.join(found)} |")
    head = HEAD.format(peft=peft.__version__, transformers=transformers.__version__)
    return head + "\n".join(lines) + "\n"


def test_the_page_says_what_the_clients_do(tmp_path):
    assert PAGE.read_text(encoding="utf-8") == write_table(tmp_path), "run python -m tests.adapters.test_clients"


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_rules_of_vllm_are_its_own(name, tmp_path):
    """Against vLLM's PEFTHelper where a vLLM is on the path, else against the page."""
    save(tmp_path, *ADAPTERS[name])
    given = json.loads((tmp_path / "adapter_config.json").read_text())
    helper = clients.load_vllms_own_helper()
    try:
        clients.refuse_features(given)
        ours = {"r", "lora_alpha", "target_modules"} <= given.keys()
    except Refused:
        ours = False
    if helper is None:
        row = next(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name} |"))
        assert ours or row.endswith("refused |")
        return
    try:
        made = helper.from_dict(given)
        theirs = not made._validate_features() and made.bias == "none"
    except ValueError:
        theirs = False
    assert ours == theirs
    if ours:
        for path in clients.list_paths(2):
            assert made.get_rank_and_scaling(path)[1] == clients.scale_in_vllm(given, path)


def test_transformers_reads_no_dora_of_pefts_either(tmp_path):
    """The page says so: the fault is not in our file."""
    save_model(make()[0], tmp_path / "base")
    ids, read = make()[1], transformers.AutoModelForCausalLM.from_pretrained
    asked = peft.LoraConfig(task_type="CAUSAL_LM", r=4, use_dora=True, target_modules=["q_proj"])
    theirs = peft.get_peft_model(read(tmp_path / "base").eval(), asked).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "magnitude" in name:
                p.mul_(1.5)
        wanted = theirs(ids).logits
        theirs.save_pretrained(tmp_path / "theirs")
        peer = read(tmp_path / "base").eval()
        missing = peer.load_adapter(tmp_path / "theirs").missing_keys
        assert not near(wanted, peer.eval()(ids).logits)
    assert all("lora_magnitude_vector" in name for name in missing)


def test_what_the_clients_read_is_what_load_adapter_reads(tmp_path):
    """Every folder of the table, loaded again here: the same logits."""
    save_model(make()[0], tmp_path / "base")
    ids = make()[1]
    for number, (config, baked) in enumerate(ADAPTERS.values()):
        wanted, _ = save(tmp_path / str(number), config, baked)
        model = load_model(tmp_path / "base")
        minipeft.load_adapter(model, tmp_path / str(number))
        with torch.no_grad():
            assert near(wanted, model(ids))


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        PAGE.write_text(write_table(Path(scratch)), encoding="utf-8")
