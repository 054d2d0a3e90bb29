"""Estimates: FLOPs against torch's own counter, memory against its profiler, on the same model; durations in words."""

import copy
import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from minipeft.adapters import FullConfig, LoRAConfig, PrefixConfig, PromptConfig, add_adapter
from minipeft.cli import main
from minipeft.errors import InputError
from minipeft.models import GPT2, GPT2Config, Llama, LlamaConfig, attention
from minipeft.models.loss import cross_entropy
from minipeft.models.quantized import quantize_model
from minipeft.runs.planning import (
    count_forward_flops,
    count_linear_weights,
    count_train_flops,
    format_seconds,
    plan,
    probe_flops,
)
from minipeft.training.gradients import released
from minipeft.training.loop import trained

DECODERS = {
    "gpt2": GPT2(GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=3, n_head=4)),
    "llama": Llama(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                               num_attention_heads=4, num_key_value_heads=2)),
}  # fmt: skip


def counted(model, tokens, learns):
    """The FLOPs of torch's matrix products, forward and (where the model learns) backward; attention not included."""
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        y = model(ids)
        if learns:
            y.sum().backward()
    products = counter.get_flop_counts()["Global"]
    return sum(flops for op, flops in products.items() if "attention" not in str(op))


@pytest.mark.parametrize("name", DECODERS)
def test_forward_flops_are_those_that_torch_counts(name):
    model = DECODERS[name].eval().requires_grad_(False)
    assert count_forward_flops(model.config, 16, document=0) == counted(model, 16, learns=False)


@pytest.mark.parametrize("name", DECODERS)
def test_full_training_is_three_forwards(name):
    model = DECODERS[name].eval().requires_grad_(True)
    whole = counted(model, 16, learns=True)
    assert count_train_flops(model.config, 16, 0, full=True) == pytest.approx(whole, rel=0.02)
    frozen = count_train_flops(model.config, 16, 0, full=False)
    assert (frozen, count_train_flops(model.config, 16, 0, full=False, activation_checkpointing=True)) == (
        whole * 2 / 3,
        whole,
    )


def test_the_head_is_counted_once_though_it_is_tied():
    config = GPT2Config()
    blocks = 12 * (768 * 2304 + 768 * 768 + 2 * 768 * 3072)
    assert count_linear_weights(config) == blocks + 50257 * 768


def test_attention_costs_its_document():
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, head_dim=8, hidden_size=32, intermediate_size=48)
    assert count_forward_flops(config, 10, 100) - count_forward_flops(config, 10, 0) == 10 * 4 * 100 * 4 * 8 * 2


def test_the_probe_finds_a_speed():
    assert probe_flops(torch.float32, torch.device("cpu")) > 1e8


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3000, "50 min"), (5400, "1.5 h"), (90_000, "25.0 h")],
)
def test_durations_in_words(seconds, said):
    assert format_seconds(seconds) == said


def test_short_durations_have_a_decimal_where_asked():
    assert [format_seconds(seconds, fine=True) for seconds in (0.123, 4.56, 12.3)] == ["0.12 s", "4.6 s", "12 s"]


WIDER = {
    "gpt2": GPT2Config(vocab_size=500, n_positions=512, n_embd=64, n_layer=4, n_head=4, resid_pdrop=0.0,
                       embd_pdrop=0.0, attn_pdrop=0.0),
    "llama": LlamaConfig(vocab_size=500, hidden_size=64, intermediate_size=176, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512),
}  # fmt: skip
ADAPTERS = {
    "full": FullConfig(),
    "full, in backward": FullConfig(),
    "lora": LoRAConfig(),
    "lora, dropout": LoRAConfig(dropout=0.1),
    "prefix": PrefixConfig(init="peft"),
    "prompt": PromptConfig(init="normal"),
}
ROWS, LENGTH = 3, 384


def profiled(config, adapter, dtype, activation_checkpointing, in_backward=False):
    """The peak bytes of torch's allocator in a real step, above the level before it."""
    model = {"gpt2": GPT2, "llama": Llama}[config.model_type](config).to(dtype)
    model.initialize(torch.Generator().manual_seed(0))
    add_adapter(model, adapter)
    model.train()
    model.activation_checkpointing = activation_checkpointing
    ids = torch.randint(config.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    profiling = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with released(trained(model) if in_backward else {}, lambda *_: None), profiling as profiler:
        cross_entropy(model.hidden(ids), model.lm_head.weight, ids).backward()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("activation_checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("family", WIDER)
def test_the_planned_step_takes_the_memory_of_a_real_one(family, name, activation_checkpointing):
    config, adapter = WIDER[family], ADAPTERS[name]
    dtype, in_backward = torch.float32 if "full" in name else torch.bfloat16, "in backward" in name
    planned = plan(
        config, adapter, rows=ROWS, length=LENGTH, dtype=dtype, activation_checkpointing=activation_checkpointing,
        optimizer_in_backward=in_backward,
    )  # fmt: skip
    ratio = planned.step / profiled(config, adapter, dtype, activation_checkpointing, in_backward)
    assert 0.85 < ratio < 1.15


def test_what_stands_beside_the_step_is_counted_by_hand():
    config = WIDER["llama"]
    found = plan(config, LoRAConfig(rank=4), rows=1, length=16, dtype=torch.bfloat16)
    widths = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 176), (64, 176), (176, 64)]
    trained = config.layers * sum(4 * (a + b) for a, b in widths)
    base = (
        500 * 64 * (1 if config.tie_word_embeddings else 2)
        + config.layers * (sum(a * b for a, b in widths) + 2 * 64)
        + 64
    )
    assert (found.trainable, found.total) == (trained, base + trained)
    assert found.weights == 2 * base + 4 * trained
    assert found.moments == 8 * trained
    assert found.peak == found.weights + found.moments + found.step


def test_a_plan_leaves_attention_as_it_was():
    real = attention.product
    plan(WIDER["gpt2"], LoRAConfig(), rows=1, length=8)
    assert attention.product is real


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="length: 505 exceeds the 504 tokens that the model has room for"):
        plan(WIDER["gpt2"], PromptConfig(length=8), length=505)


def test_the_command_plans_what_it_is_told(capsys):
    line = ["plan", "demo", "--method", "lora", "full", "prompt", "--length", "64", "--batch", "2"]
    assert main([*line, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in rows] == ["lora", "full", "prompt"]
    assert [row["dtype"] for row in rows] == ["bfloat16", "float32", "bfloat16"]
    assert all(row["peak"] == row["weights"] + row["moments"] + row["step"] > 0 for row in rows)
    assert rows[0]["trainable"] == 262_144
    assert main(line) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:6] == ["model", "method", "rows", "base", "trained", "%"]
    assert lines[0].split()[:8] == ["demo", "lora", "2", "x", "64", "bfloat16", "262,144", "5.7"]


def test_the_dtype_is_of_the_base(capsys):
    """Of the file, for full tuning float32; or the given one. Gradients and moments of bfloat16 weights are float32."""
    line = ["plan", "demo", "--method", "full", "lora", "--length", "16", "--json"]
    found = []
    for given in ([], ["--dtype", "bf16"]):
        assert main([*line, *given]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [[row["dtype"] for row in rows] for rows in found] == [["float32", "bfloat16"], ["bfloat16", "bfloat16"]]
    (wide, _), (narrow, _) = found
    assert narrow["weights"] == wide["weights"] / 2
    assert narrow["moments"] == wide["moments"] == 8 * wide["trainable"]
    assert narrow["step"] >= 4 * narrow["trainable"]


def test_the_optimizer_in_backward_is_planned(capsys):
    """Without the gradients of the blocks; with clipping twice the FLOPs."""
    line = ["plan", "demo", "--method", "full", "--length", "16", "--json"]
    rows = []
    for more in ([], ["--optimizer-in-backward"], ["--optimizer-in-backward", "--clip", "0"]):
        assert main([*line, *more]) == 0
        rows += json.loads(capsys.readouterr().out)
    plain, clipped, free = rows
    blocks = 12 * 256 * 256  # weights of a block's linears
    assert clipped["step"] == free["step"] < plain["step"] - 4 * 3 * blocks
    assert clipped["flops"] == 2 * plain["flops"] == 2 * free["flops"]


def test_layers_beyond_reason_are_refused_before_they_are_built(tmp_path, capsys):
    config = {"model_type": "gpt2", "n_layer": 10**9, "n_embd": 32, "n_head": 4, "vocab_size": 50, "n_positions": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path), "--method", "lora"]) == 2
    assert "layers: 1000000000 are more than the 512 that any known model has" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "plan: give models, or --preset paper"),
        (["demo", "--length", "600"], "length: 600 exceeds the 512 tokens that the model has room for"),
        (["demo", "--rank", "0", "--method", "lora"], "rank: 0 must be an integer >= 1"),
        (["demo", "--device", "tpu"], "device: 'tpu' cannot be used"),
        (["nowhere/at-all/", "--method", "lora"], "nowhere/at-all"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(arguments, said, capsys):
    assert main(["plan", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_trained_shares_are_those_that_the_paper_prints(assets, capsys):
    """CodeLlama-7B: 0.59 % with LoRA, 0.08 % with a prefix, 0.001 % with a prompt (its Table 3)."""
    folder = assets / "fixtures" / "codellama-7b-config"
    assert main(["plan", str(folder), "--method", "lora", "prefix", "prompt", "--length", "32", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [float(f"{row['percent']:.1g}") if row["percent"] < 0.1 else round(row["percent"], 2) for row in rows] == [
        0.59,
        0.08,
        0.001,
    ]


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantized_base_is_planned_by_its_codes(name, quantize):
    """Parameters are counted as weights, not as bytes of codes; memory as what the quantized model holds."""
    config = DECODERS[name].config
    plain = plan(config, LoRAConfig(rank=2), dtype=torch.bfloat16, length=16)
    found = plan(config, LoRAConfig(rank=2), dtype=torch.bfloat16, length=16, quantize=quantize)
    assert (found.total, found.trainable, found.flops) == (plain.total, plain.trainable, plain.flops)
    model = quantize_model(copy.deepcopy(DECODERS[name]).to(torch.bfloat16), quantize)
    add_adapter(model, LoRAConfig(rank=2))
    held = sum(getattr(p, "nbytes_held", lambda p=p: p.nbytes)() for p in model.parameters())
    assert found.weights == held < plain.weights


def test_the_papers_share_of_gpt2_medium_counts_bytes_of_codes():
    """Table 3 prints 2.99 % for LoRA r16 on GPT-2 M: its 4-bit base counted by bytes. By weights it is 1.74 %."""
    medium = GPT2Config(n_embd=1024, n_layer=24, n_head=16)
    found = plan(medium, LoRAConfig(rank=16), dtype=torch.bfloat16, length=16, quantize="nf4")
    assert (found.trainable, found.packed, found.total) == (6_291_456, 210_119_680, 361_114_624)
    assert f"{100 * found.trainable / found.packed:.2f} {found.percent:.2f}" == "2.99 1.74"


def test_the_probe_counts_a_product_however_late_the_process_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a loaded machine the time may be over before the first product; the rate was 0 then, and divided by."""
    late = iter(range(0, 1000, 10))
    monkeypatch.setattr("minipeft.runs.planning.time.perf_counter", lambda: float(next(late)))
    assert probe_flops(torch.float32, torch.device("cpu")) > 0
