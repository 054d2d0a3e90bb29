"""Loading and saving checkpoints: transformers' files both ways, the variants found in the wild, every bad input."""

import json
import os
import pickle
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minipeft.errors import InputError
from minipeft.models import FAMILIES
from minipeft.models.checkpoint import fingerprint, load_model, save_model

SMALL = {"n_layer": 2, "n_positions": 40}
STYLES = {
    "gpt2 tied": ("gpt2", {}),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt2 n_inner": ("gpt2", {"n_inner": 20, "scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"}),
    "llama untied": ("llama", {}),
    "llama tied, biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama head_dim": ("llama", {"head_dim": 12, "rope_theta": 500000.0}),
    "llama linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama llama3": ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                     "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
    "mistral untied": ("mistral", {}),
    "mistral tied, no window": ("mistral", {"tie_word_embeddings": True, "sliding_window": None}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "wanted"),
    [({}, 2), ({"eos_token_id": None}, 2), ({"eos_token_id": 2}, 2), ({"eos_token_id": [5, 2]}, (2, 5))],
)
def test_the_end_tokens_of_generation_config_count_too(twins, given, wanted):
    folder = twins.save(twins.peer("llama", eos_token_id=2))
    (folder / "generation_config.json").write_text(json.dumps(given))
    assert load_model(folder).config.eos_token_id == wanted


@pytest.mark.parametrize("given", ["</s>", [2, True], [-1], 1.5])
def test_end_tokens_that_are_no_ids(twins, given):
    folder = twins.save(twins.peer("llama"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    with pytest.raises(InputError, match=r"generation_config.json: eos_token_id: .* must be an id or a list of ids"):
        load_model(folder)


class TestSave:
    @pytest.mark.parametrize("style", STYLES)
    def test_transformers_reads_it_with_equal_logits(self, style, twins, apart, ids, tmp_path):
        family, changes = STYLES[style]
        ours, theirs = twins(family, **changes)
        save_model(ours, tmp_path / "saved")
        again, report = type(theirs).from_pretrained(tmp_path / "saved", output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert apart(ours, again.eval(), ids) <= 2e-5
        with torch.no_grad():
            assert torch.equal(again(ids).logits, theirs(ids).logits)

    @pytest.mark.parametrize("style", STYLES)
    def test_load_of_save_is_identity(self, style, twins, ids, tmp_path):
        family, changes = STYLES[style]
        ours, _ = twins(family, **changes)
        save_model(ours, tmp_path / "one")
        again = load_model(tmp_path / "one")
        save_model(again, tmp_path / "two")
        for name in ("config.json", "model.safetensors"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert again.config == ours.config
        assert ours.state_dict().keys() == again.state_dict().keys()
        assert all(torch.equal(p, again.state_dict()[name]) for name, p in ours.state_dict().items())
        assert not again.training
        assert (again.lm_head.weight is again.embedding.weight) == again.config.tie_word_embeddings

    def test_its_tensors_are_transformers_own(self, twins, tmp_path):
        """The names, shapes and values of the file that transformers wrote, GPT-2's transposed linears included."""
        for family in ("gpt2", "llama"):
            folder = twins.save(twins.peer(family))
            save_model(load_model(folder), tmp_path / family)
            wrote, saved = (load_file(f / "model.safetensors") for f in (folder, tmp_path / family))
            assert wrote.keys() == saved.keys()
            assert all(torch.equal(wrote[name], saved[name]) for name in wrote)

    def test_over_its_own_folder(self, twins, ids, tmp_path):
        """The tensors are mapped from the file that is replaced: they must not change under the model."""
        ours, _ = twins("llama")
        save_model(ours, tmp_path / "m")
        model = load_model(tmp_path / "m")
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
            wanted = model(ids)
            save_model(model, tmp_path / "m")
            assert torch.equal(model(ids), wanted)
            assert torch.equal(load_model(tmp_path / "m")(ids), wanted)

    def test_changing_a_loaded_model_leaves_the_file_alone(self, twins, tmp_path):
        ours, _ = twins("llama")
        save_model(ours, tmp_path / "m")
        before = (tmp_path / "m" / "model.safetensors").read_bytes()
        with torch.no_grad():
            for p in load_model(tmp_path / "m").parameters():
                p.zero_()
        assert (tmp_path / "m" / "model.safetensors").read_bytes() == before

    def test_bfloat16(self, twins, tmp_path):
        ours, _ = twins("llama", tie_word_embeddings=True)
        ours.to(torch.bfloat16)
        save_model(ours, tmp_path / "m")
        again = load_model(tmp_path / "m")
        assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
        assert all(torch.equal(p, again.state_dict()[name]) for name, p in ours.state_dict().items())
        peer = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "m")
        assert peer.dtype == torch.bfloat16

    def test_a_model_that_holds_more_is_refused(self, twins, tmp_path):
        ours, _ = twins("llama")
        ours.blocks[0].self_attn.q_proj.register_parameter("lora_A", torch.nn.Parameter(torch.zeros(1)))
        with pytest.raises(InputError, match=r"save_model: the model holds an adapter .*q_proj\.lora_A.*merge_adapter"):
            save_model(ours, tmp_path / "m")
        assert not (tmp_path / "m").exists()

    def test_a_folder_that_cannot_be(self, twins, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match=r"file/m/model\.safetensors: cannot write: "):
            save_model(twins("llama")[0], tmp_path / "file" / "m")


def rewrite(folder: Path, change) -> Path:
    """Change the tensors of a folder's model.safetensors."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def bare(tensors: dict) -> dict:
    """GPT-2's own file on the hub: no `transformer.`."""
    return {name.removeprefix("transformer."): t for name, t in tensors.items()}


def masked(tensors: dict) -> dict:
    """With the attention masks that transformers 2 to 4 kept as buffers."""
    stem = "" if "wte.weight" in tensors else "transformer."
    mask = torch.ones(40, 40, dtype=torch.uint8).tril()[None, None]
    for layer in (0, 1):
        tensors[f"{stem}h.{layer}.attn.bias"] = mask.clone()
        tensors[f"{stem}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return tensors


def headed(tensors: dict) -> dict:
    """With the tied head written out."""
    return tensors | {"lm_head.weight": next(t for name, t in tensors.items() if name.endswith("wte.weight")).clone()}


def rotary(tensors: dict) -> dict:
    """With the angles that transformers 4 kept as buffers."""
    return tensors | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}


class TestVariants:
    @pytest.mark.parametrize("changes", [[bare], [masked], [headed], [bare, masked], [bare, masked, headed]])
    def test_gpt2_files(self, changes, twins, apart, ids):
        theirs = twins.peer("gpt2", **SMALL)
        folder = twins.save(theirs)
        for change in changes:
            rewrite(folder, change)
        assert apart(load_model(folder), theirs, ids) <= 2e-5

    def test_gpt2_untied_and_bare(self, twins, apart, ids):
        """CodeGPT's style of head, in a file without `transformer.`."""
        theirs = twins.peer("gpt2", tie_word_embeddings=False)
        assert apart(load_model(rewrite(twins.save(theirs), bare)), theirs, ids) <= 2e-5

    def test_llama_with_rotary_buffers(self, twins, apart, ids):
        theirs = twins.peer("llama")
        assert apart(load_model(rewrite(twins.save(theirs), rotary)), theirs, ids) <= 2e-5

    @pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
    @pytest.mark.parametrize("tied", [True, False])
    def test_sharded(self, family, tied, twins, apart, ids, tmp_path):
        theirs = twins.peer(family, tie_word_embeddings=tied)
        theirs.save_pretrained(tmp_path / "m", max_shard_size="20KB")
        assert len(list((tmp_path / "m").glob("model-*.safetensors"))) >= 3
        assert not (tmp_path / "m" / "model.safetensors").exists()
        assert apart(load_model(tmp_path / "m"), theirs, ids) <= 2e-5

    def test_mixed_dtypes_become_the_widest(self, twins, ids):
        def halved(kind, rest=None):
            return lambda tensors: {n: t.to(kind if "mlp" in n else rest or t.dtype) for n, t in tensors.items()}

        f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
        for kind, rest, widest in ((bf16, None, f32), (f16, None, f32), (f16, bf16, f32), (bf16, bf16, bf16)):
            folder = rewrite(twins.save(twins.peer("llama")), halved(kind, rest))
            model, stored = load_model(folder), load_file(folder / "model.safetensors")
            assert {p.dtype for p in model.parameters()} == {widest}
            assert all(torch.equal(p, stored[name].to(widest)) for name, p in model.state_dict().items())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_dtype_is_honoured(self, dtype, twins):
        folder = twins.save(twins.peer("gpt2"))
        model, stored = load_model(folder, dtype=dtype), load_model(folder)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert all(torch.equal(p, stored.state_dict()[name].to(dtype)) for name, p in model.state_dict().items())

    def test_values_that_float16_cannot_hold_are_refused(self, twins):
        big = lambda tensors: tensors | {"model.norm.weight": torch.full((32,), 1e5)}
        folder = rewrite(twins.save(twins.peer("llama")), big)
        with pytest.raises(InputError, match=r"tensor 'model\.norm\.weight': holds values beyond float16's 65504"):
            load_model(folder, dtype=torch.float16)
        assert float(load_model(folder, dtype=torch.bfloat16).state_dict()["model.norm.weight"].max()) > 9e4

    def test_no_other_dtype(self, twins):
        with pytest.raises(InputError, match=r"dtype: torch\.float64 is not a dtype for weights"):
            load_model(twins.save(twins.peer("gpt2")), dtype=torch.float64)

    def test_code_named_in_config_json_is_ignored(self, bad_inputs, ids, tmp_path):
        """auto_map names code in the folder, which is never read."""
        bad_inputs.write_sound(tmp_path / "m")
        wanted = load_model(tmp_path / "m")(ids)
        bad_inputs.config(auto_map={"AutoModelForCausalLM": "evil.Model"}, custom_pipelines={"x": {"impl": "evil.P"}})(
            tmp_path / "m"
        )
        (tmp_path / "m" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        assert torch.equal(load_model(tmp_path / "m")(ids), wanted)
        assert not (tmp_path / "ran").exists()

    def test_a_byte_order_mark_is_passed_over(self, bad_inputs, ids, tmp_path):
        bad_inputs.write_sound(tmp_path / "m")
        wanted = load_model(tmp_path / "m")(ids)
        file = tmp_path / "m" / "config.json"
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        assert torch.equal(load_model(tmp_path / "m")(ids), wanted)

    def test_the_links_of_a_hub_cache_are_followed(self, bad_inputs, tmp_path):
        """snapshots/COMMIT/NAME -> ../../blobs/HASH, and nowhere else."""
        bad_inputs.write_sound(tmp_path / "plain")
        folder, blobs = tmp_path / "models--x" / "snapshots" / "c0ffee", tmp_path / "models--x" / "blobs"
        folder.mkdir(parents=True)
        blobs.mkdir()
        for name in ("config.json", "model.safetensors"):
            (tmp_path / "plain" / name).rename(blobs / f"hash-of-{name}")
            (folder / name).symlink_to(f"../../blobs/hash-of-{name}")
        assert load_model(folder).config.hidden_size == 32

    def test_a_folder_that_is_a_link_is_followed(self, bad_inputs, tmp_path):
        bad_inputs.write_sound(tmp_path / "plain")
        (tmp_path / "link").symlink_to(tmp_path / "plain")
        assert load_model(tmp_path / "link").config.hidden_size == 32


def outcome(folder: Path, legacy_bin: bool = False) -> str | None:
    """The text of load_model's InputError, None where it loads; any other error goes through."""
    try:
        load_model(folder, legacy_bin=legacy_bin)
    except InputError as error:
        return str(error)
    return None


class Evil:
    """A pickle of it makes a file when it is opened."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


class TestLegacyBin:
    @pytest.fixture
    def folder(self, twins) -> Path:
        """A folder with pytorch_model.bin only, as CodeGPT's."""
        folder = twins.save(twins.peer("gpt2"))
        tensors = masked(load_file(folder / "model.safetensors"))
        torch.save(headed(tensors), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        return folder

    def test_it_is_read_when_asked_for(self, folder, twins, apart, ids):
        assert apart(load_model(folder, legacy_bin=True), twins.peer("gpt2"), ids) <= 2e-5

    def test_without_the_word_it_is_refused(self, folder):
        with pytest.raises(InputError) as error:
            load_model(folder)
        assert all(said in str(error.value) for said in (str(folder), "pytorch_model.bin", "legacy_bin=True"))

    def test_files_of_torch_before_1_6(self, folder, twins, apart, ids):
        tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        assert apart(load_model(folder, legacy_bin=True), twins.peer("gpt2"), ids) <= 2e-5

    def test_safetensors_go_first(self, folder, twins, ids):
        save_file(load_file(twins.save(twins.peer("gpt2", seed=1)) / "model.safetensors"), folder / "model.safetensors")
        both = load_model(folder, legacy_bin=True)
        (folder / "pytorch_model.bin").unlink()
        assert torch.equal(both(ids), load_model(folder)(ids))

    @pytest.mark.parametrize("old", [False, True])
    def test_a_malicious_one_does_not_run(self, old, folder, tmp_path, opened):
        file, mark = folder / "pytorch_model.bin", tmp_path / "ran"
        torch.save({"a": Evil(mark)}, file, _use_new_zipfile_serialization=not old)
        with pytest.raises(InputError), opened as names:
            load_model(folder)
        assert str(file) not in names, "refused without opening it"
        with pytest.raises(InputError, match=r"pytorch_model\.bin: cannot be read as weights"), opened as names:
            load_model(folder, legacy_bin=True)
        assert str(file) in names, "the control: opening is seen"
        assert not mark.exists()
        torch.load(file, weights_only=False)
        assert mark.exists(), "the control: it would have run"

    @pytest.mark.parametrize(
        ("held", "says"),
        [
            (b"", "cannot be read as weights"),
            (b"PK\x03\x04 broken", "cannot be read as weights"),
            (b"<html>", "cannot be read as weights"),
            (b"\x80\x02.", "cannot be read as weights"),
            ([torch.zeros(2)], "must hold names and tensors"),
            ({"state_dict": {"a": torch.zeros(2)}}, "must hold names and tensors"),
            ({1: torch.zeros(2)}, "must hold names and tensors"),
            ({"a": torch.zeros(2, 2).to_sparse()}, "must hold names and tensors"),
            ({"a": torch.zeros(2)}, "no tensor 'transformer.h.0."),
        ],
    )
    def test_bad_ones(self, held, says, folder):
        if isinstance(held, bytes):
            (folder / "pytorch_model.bin").write_bytes(held)
        else:
            torch.save(held, folder / "pytorch_model.bin")
        with pytest.raises(InputError) as error:
            load_model(folder, legacy_bin=True)
        assert str(error.value).startswith(f"{folder / 'pytorch_model.bin'}: ")
        assert says in str(error.value)

    @pytest.mark.parametrize("position", range(0, 1000, 40))
    def test_flipped_bytes_give_no_other_error(self, position, folder):
        file = folder / "pytorch_model.bin"
        data = bytearray(file.read_bytes())
        data[position * len(data) // 1000] ^= 0x55
        file.write_bytes(data)
        assert str(file) in (outcome(folder, legacy_bin=True) or str(file))

    def test_a_link_that_leaves_the_folder(self, folder, tmp_path):
        (folder / "pytorch_model.bin").rename(tmp_path / "elsewhere.bin")
        (folder / "pytorch_model.bin").symlink_to(tmp_path / "elsewhere.bin")
        with pytest.raises(InputError, match="link that leaves the model folder"):
            load_model(folder, legacy_bin=True)


class Opened:
    """While it is entered, the paths of all files that Python opens."""

    def __init__(self):
        self.names: list[str] | None = None
        sys.addaudithook(self.note)  # for good: a hook cannot be taken away

    def note(self, event: str, arguments: tuple) -> None:
        if self.names is not None and event == "open":
            self.names.append(str(arguments[0]))

    def __enter__(self) -> list[str]:
        self.names = []
        return self.names

    def __exit__(self, *_: object) -> None:
        self.names = None


@pytest.fixture(scope="session")
def opened() -> Opened:
    return Opened()


class TestBadInputs:
    """The table of tests/bad_inputs.py: one InputError each, `FILE: WHERE: PROBLEM. HINT`, without delay."""

    def test_each_gives_one_error_that_names_the_place(self, bad_checkpoint, tmp_path, opened):
        folder = tmp_path / "model"
        bad_checkpoint.make(folder)
        start = time.perf_counter()
        with pytest.raises(InputError) as error, opened as names:
            load_model(folder)
        seconds = time.perf_counter() - start
        text = str(error.value)
        assert text.startswith(f"{folder}")
        assert "\n" not in text
        text.encode()  # can be printed
        assert len(text) < 600
        for said in bad_checkpoint.says:
            assert said in text
        assert not any(str(tmp_path / "outside") in name or "pytorch_model.bin" in name for name in names)
        assert seconds < 1

    def test_the_sound_folders_load(self, bad_inputs, tmp_path):
        for family in bad_inputs.CONFIGS:
            bad_inputs.write_sound(tmp_path / family / "m", family)
            assert load_model(tmp_path / family / "m").config.model_type == family
        bad_inputs.write_sharded(tmp_path / "llama" / "m")
        assert not (tmp_path / "llama" / "m" / "model.safetensors").exists()
        assert load_model(tmp_path / "llama" / "m").config.layers == 2

    def test_nothing_is_allocated_for_what_is_refused(self, bad_inputs, tmp_path):
        """The largest cases claim up to 10^20 bytes; the process's peak grows by less than 50 MB."""
        if not Path("/proc/self/clear_refs").exists():
            pytest.skip("the peak is read from /proc")
        for case in bad_inputs.CHECKPOINTS:
            if case.name.startswith(("C13", "C14", "S04", "S10")):
                case.make(tmp_path / case.name / "m")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = peak()
        for folder in tmp_path.iterdir():
            with pytest.raises(InputError):
                load_model(folder / "m")
        assert peak() - before < 50 * 2**20

    def test_a_tensor_file_by_bytes(self, bad_inputs, tmp_path):
        """Any byte of the header changed: an InputError, or the same model (a blank, say); no other error."""
        bad_inputs.write_sound(tmp_path / "m")
        file = tmp_path / "m" / "model.safetensors"
        sound = file.read_bytes()
        length = 8 + struct.unpack("<Q", sound[:8])[0]
        draw = np.random.default_rng(0)
        refused = 0
        for _ in range(300):
            data = bytearray(sound)
            data[int(draw.integers(length))] = int(draw.integers(256))
            file.write_bytes(data)
            said = outcome(tmp_path / "m")
            refused += said is not None
            assert said is None or said.startswith(str(tmp_path))
        assert refused > 250

    def test_config_json_by_values(self, bad_inputs, tmp_path):
        """Every field set to every kind of JSON value: an InputError that names config.json or weights, or a model."""
        odd = [None, True, -1, 0, 3, 10**6, 10**30, 1.5, 1e308, "", "x", [], [1], {}, {"a": 1}]
        bad_inputs.write_sound(tmp_path / "m")
        sound = (tmp_path / "m" / "config.json").read_text()
        names = [
            *json.loads(sound),
            "head_dim",
            "rope_scaling",
            "rope_parameters",
            "attention_bias",
            "mlp_bias",
            "attention_dropout",
            "eos_token_id",
            "initializer_range",
            "partial_rotary_factor",
        ]
        for name in names:
            for value in odd:
                (tmp_path / "m" / "config.json").write_text(json.dumps({**json.loads(sound), name: value}))
                said = outcome(tmp_path / "m")
                assert said is None or said.startswith(str(tmp_path)), (name, value)

    def test_a_pickle_that_calls_itself_safetensors_does_not_run(self, bad_inputs, tmp_path):
        bad_inputs.write_sound(tmp_path / "m")
        (tmp_path / "m" / "model.safetensors").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
        with pytest.raises(InputError, match="pickle"):
            load_model(tmp_path / "m")
        assert not (tmp_path / "ran").exists()

    def test_what_is_no_folder(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match=r"file: is a file; the folder that holds it is wanted"):
            load_model(tmp_path / "file")
        with pytest.raises(InputError, match=r"nowhere: no such folder, and not a hub id"):
            load_model(tmp_path / "nowhere")


def peak() -> int:
    """The largest memory of this process, in bytes, since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def test_the_fingerprint_reads_every_byte(tmp_path):
    """A changed byte in the middle of a large file counts; only 64 KiB at either end used to be read."""
    model = FAMILIES["gpt2"].decoder(FAMILIES["gpt2"].config(vocab_size=4096, n_embd=64, n_layer=1, n_head=2))
    model.initialize(torch.Generator().manual_seed(0))
    save_model(model, tmp_path)
    file = tmp_path / "model.safetensors"
    assert file.stat().st_size > 4 * 2**17
    first, stat = fingerprint(tmp_path), file.stat()
    assert fingerprint(tmp_path) == first
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert fingerprint(tmp_path) != first


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_in_several_files_is_read_here_and_by_transformers(twins, family, tmp_path):
    """Files of at most 4096 bytes, but for a larger tensor; tied and transposed weights as in one file."""
    model = load_model(twins.save(twins.peer(family)))
    save_model(model, tmp_path / "many", shard_bytes=4096)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 2
    stored = {file: load_file(tmp_path / "many" / file) for file in files}
    assert {name: file for file, tensors in stored.items() for name in tensors} == index["weight_map"]
    sizes = [[t.nbytes for t in tensors.values()] for tensors in stored.values()]
    assert all(sum(held) <= 4096 or len(held) == 1 for held in sizes)
    assert index["metadata"]["total_size"] == sum(map(sum, sizes))
    again, theirs = load_model(tmp_path / "many"), transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
    ids = torch.arange(8)[None]
    assert (theirs(ids).logits - again(ids)).abs().max() < 1e-5


def test_several_files_beside_a_single_one_are_refused(twins):
    """Readers prefer model.safetensors: the new weights would not be read."""
    folder = twins.save(twins.peer("llama"))
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"model\.safetensors: is there already, and would be read instead"):
        save_model(load_model(folder), folder, shard_bytes=4096)
    assert (folder / "model.safetensors").read_bytes() == before
    assert not list(folder.glob("model-*"))
