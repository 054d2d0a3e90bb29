"""Configs that change under a checkpoint: both spellings mean one thing, and a contradiction is refused."""

import json

import torch

from minipeft import load_model
from tests.museum.twins import Twins


def rewrite(both: Twins, **changes: object) -> None:
    """Write config.json with rotary settings in another form."""
    file = both.folder / "config.json"
    given = {key: value for key, value in json.loads(file.read_text()).items() if not key.startswith("rope_")}
    file.write_text(json.dumps(given | changes))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip


def test_rotary_base_in_both_spellings(exhibit, twins, ids, apart):
    """deepspeedai/DeepSpeed#8345, vllm-project/vllm#42624, Open-Athena/MarinFold#184, sgl-project/sglang#14745:
    transformers 5 writes rope_theta into rope_parameters, and readers of the old place silently use the
    default, 10000."""
    both = twins(rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    with torch.no_grad():
        wanted = both.theirs(ids).logits
        assert apart(both.ours(ids), wanted) < 1e-5
        rewrite(both, rope_theta=500000.0)
        assert apart(load_model(both.folder)(ids), wanted) < 1e-5
        rewrite(both)
        assert apart(load_model(both.folder)(ids), wanted) > 0.01  # the base matters
        rewrite(both, rope_theta=500000.0)
        with exhibit.theirs("transformers") as peer:
            peer.right = apart(both.reload()(ids).logits, wanted) < 1e-5


def test_rotary_scaling_in_both_spellings(exhibit, twins, ids, apart):
    """NVIDIA-NeMo/Megatron-Bridge#3077, microsoft/onnxruntime-genai#2609: rope_scaling, as transformers 4 wrote it,
    loses the base or the type where transformers 5's rope_parameters are read."""
    both = twins(rope_parameters={"rope_theta": 500000.0, **LLAMA3})
    with torch.no_grad():
        wanted = both.theirs(ids).logits
        assert apart(both.ours(ids), wanted) < 1e-5
        rewrite(both, rope_theta=500000.0, rope_scaling=LLAMA3)
        assert apart(load_model(both.folder)(ids), wanted) < 1e-5
        with exhibit.theirs("transformers") as peer:
            peer.right = apart(both.reload()(ids).logits, wanted) < 1e-5


def test_rotary_settings_that_disagree(exhibit, twins):
    """MakazhanAlpamys/Soup#793: a rope_scaling set beside other rotary settings has no effect."""
    both = twins()
    rewrite(
        both,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rope_scaling={"rope_type": "linear", "factor": 4.0},
    )
    with exhibit.refused("but rope_parameters has"):
        load_model(both.folder)
