"""Safetensors headers and writing, against the safetensors library."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save, save_file

from minipeft import tensor_files
from minipeft.errors import InputError
from minipeft.tensor_files import TensorInfo, check_header, read_header, write_tensors
from tests.test_files import refused

TENSORS = {
    "b": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "a": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "empty": torch.zeros(0, 7),
    "scalar": torch.tensor(2.5),
    "größe": torch.arange(5),
    "half": torch.ones(3, dtype=torch.float16),
    "bytes": torch.arange(3, dtype=torch.uint8),
    "yes": torch.tensor([True, False]),
}


class TestHeader:
    def test_it_is_the_librarys(self, tmp_path):
        save_file(TENSORS, tmp_path / "f", metadata={"format": "pt"})
        header = read_header(tmp_path / "f")
        with safe_open(tmp_path / "f", framework="pt") as opened:
            assert header.keys() == set(opened.keys())
            for name, info in header.items():
                assert (info.dtype, info.shape) == (
                    opened.get_slice(name).get_dtype(),
                    tuple(opened.get_slice(name).get_shape()),
                )
        data = (tmp_path / "f").read_bytes()
        start = 8 + struct.unpack("<Q", data[:8])[0]
        info = header["b"]
        assert data[start + info.start : start + info.stop] == TENSORS["b"].numpy().tobytes()

    def test_what_passes_here_passes_the_library(self, tmp_path):
        """600 headers with one to three bytes changed: read_header accepts none that the library refuses."""
        sound = save({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.int64)}, metadata={"format": "pt"})
        length = 8 + struct.unpack("<Q", sound[:8])[0]
        draw = np.random.default_rng(0)
        file, both, ours = tmp_path / "f", 0, 0
        signs = np.frombuffer(b'0123456789"{}[],:FIB \\u-.e', dtype=np.uint8)
        for _ in range(600):
            data = bytearray(sound)
            for _ in range(int(draw.integers(1, 4))):
                data[int(draw.integers(length))] = int(
                    draw.choice(signs) if draw.random() < 0.7 else draw.integers(256)
                )
            file.write_bytes(data)
            try:
                read_header(file)
            except InputError as error:
                assert str(error).startswith(str(file))  # noqa: PT017
                ours += 1
                continue
            load(bytes(data))
            both += 1
        assert ours > 450
        assert both > 3, "the control: some changes are harmless"

    @pytest.mark.parametrize("length", [0, 7, 8, 9, 50])
    def test_any_bytes_are_an_input_error(self, length, tmp_path):
        draw = np.random.default_rng(length)
        for _ in range(50):
            (tmp_path / "f").write_bytes(draw.bytes(length))
            refused(read_header, tmp_path / "f")

    def test_no_data_is_read(self, tmp_path):
        """A file of 1 TB (sparse) is checked at once."""
        text = json.dumps({"a": {"dtype": "U8", "shape": [10**12], "data_offsets": [0, 10**12]}}).encode()
        with open(tmp_path / "f", "wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            try:
                stream.truncate(8 + len(text) + 10**12)
            except OSError:
                pytest.skip("this file system holds no file of 1 TB")
        assert read_header(tmp_path / "f")["a"].shape == (10**12,)

    def test_a_huge_header_is_not_read(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tensor_files, "LARGEST_HEADER", 10)
        save_file({"a": torch.zeros(2)}, tmp_path / "f")
        assert "not safetensors, or truncated" in refused(read_header, tmp_path / "f")


class TestWriteTensors:
    def test_the_library_reads_them(self, tmp_path):
        write_tensors(tmp_path / "f", TENSORS)
        again = load_file(tmp_path / "f")
        assert again.keys() == TENSORS.keys()
        for name, t in TENSORS.items():
            assert (again[name].dtype, again[name].shape) == (t.dtype, t.shape)
            assert torch.equal(again[name], t)
        assert read_header(tmp_path / "f").keys() == TENSORS.keys()

    def test_the_bytes_are_the_librarys(self, tmp_path):
        tensors = {name: t for name, t in TENSORS.items() if t.dtype == torch.float32}
        write_tensors(tmp_path / "f", tensors)
        assert (tmp_path / "f").read_bytes() == save(tensors, metadata={"format": "pt"})

    def test_what_is_not_contiguous_or_needs_gradients(self, tmp_path):
        t = torch.nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
        write_tensors(tmp_path / "f", {"turned": t.T, "every second": t[::2], "row": t[1].expand(2, 3)})
        again = load_file(tmp_path / "f")
        assert torch.equal(again["turned"], t.detach().T)
        assert torch.equal(again["every second"], t.detach()[::2])
        assert torch.equal(again["row"], t.detach()[1].expand(2, 3))

    def test_the_order_given_does_not_matter(self, tmp_path):
        write_tensors(tmp_path / "one", TENSORS)
        write_tensors(tmp_path / "two", dict(reversed(TENSORS.items())))
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()

    def test_each_number_is_aligned_to_its_size(self, tmp_path):
        """A mapped float that does not begin at a multiple of its size would be copied, or be slow."""
        write_tensors(tmp_path / "f", TENSORS)
        data = (tmp_path / "f").read_bytes()
        begin = 8 + struct.unpack("<Q", data[:8])[0]
        for name, info in read_header(tmp_path / "f").items():
            assert (begin + info.start) % TENSORS[name].element_size() == 0, name


def test_the_library_says_the_same_of_what_is_refused_here(tmp_path):
    """Gaps, overlaps, wrong sizes: the library refuses them too."""
    sound = save({"a": torch.zeros(4), "b": torch.zeros(4)})
    length = struct.unpack("<Q", sound[:8])[0]
    header, data = json.loads(sound[8 : 8 + length]), sound[8 + length :]
    for offsets in ([0, 16], [8, 24], [16, 28], [32, 16], [20, 36]):
        text = json.dumps({**header, "b": {**header["b"], "data_offsets": offsets}}).encode()
        (tmp_path / "f").write_bytes(struct.pack("<Q", len(text)) + text + data)
        refused(read_header, tmp_path / "f")
        with pytest.raises(SafetensorError):
            load((tmp_path / "f").read_bytes())


def header_of(file: Path, **tensors: torch.Tensor) -> dict[str, TensorInfo]:
    write_tensors(file, tensors)
    return read_header(file)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"a": (2, 3), "b": (4,), "c": (1,), "d": (1,)}, "missing tensors: c, d (2 in all)"),
        ({"a": (2, 3)}, "unexpected tensors: b (1 in all)"),
        ({"a": (3, 2), "b": (4,)}, "tensor 'a': shape [2, 3], want [3, 2]. Is it another model's?"),
        ({"a": (2, 3), "b": (4,), "o": (1,)}, "tensor 'b': dtype I32, want F32/F16/BF16"),
    ],
)
def test_a_header_is_checked_against_what_is_wanted(wanted: dict, said: str, tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    header = header_of(file, a=torch.zeros(2, 3), b=torch.zeros(4, dtype=torch.int32))
    with pytest.raises(InputError) as error:
        check_header(header, wanted, file, optional=("o",), hint="Is it another model's?")
    assert str(error.value) == f"{file}: {said}"
    check_header(header, {"a": (2, 3), "b": (4,)}, file, dtypes=("F32", "I32"))


def test_a_header_under_other_names_is_named_as_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    ours = {f"transformer.{name}": info for name, info in header_of(file, wte=torch.zeros(2)).items()}
    with pytest.raises(InputError, match=r"tensor 'wte': shape \[2\], want \[3\]$"):
        check_header(ours, {"transformer.wte": (3,)}, file)


@pytest.mark.parametrize("spelling", ["data_offsets", "data_offset\\u0073"])
def test_a_header_of_too_many_tensors_is_refused(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "MOST_TENSORS", 100)
    entry = '{"dtype": "F32", "shape": [0], "SPELLING": [0, 0]}'.replace("SPELLING", spelling)
    raw = ("{" + ", ".join(f'"t{n}": {entry}' for n in range(101)) + "}").encode()
    (tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(InputError, match=r"x.safetensors: header: 101 tensors, more than 100"):
        read_header(tmp_path / "x.safetensors")
