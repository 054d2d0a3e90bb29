"""Definitions found by name are the source of what runs, and marking their syntax loses no character."""

import inspect
import textwrap

import minipeft_kernels
import pytest

from minipeft import documents
from minipeft.adapters import find_method, lora
from minipeft.errors import InputError
from minipeft.tour.sources import find_source, mark_syntax


@pytest.mark.parametrize(
    ("name", "thing"),
    [
        ("minipeft.documents.visible", documents.visible),
        ("minipeft.adapters.lora.LoRALinear", lora.LoRALinear),
        ("minipeft.adapters.lora.LoRALinear.forward", lora.LoRALinear.forward),
        ("minipeft.adapters.lora.LoRAConfig", lora.LoRAConfig),  # with its decorator
        ("minipeft_kernels.dropout.make_dropout", minipeft_kernels.make_dropout),
        ("minipeft.adapters.find_method", find_method),
    ],
)
def test_the_text_is_that_of_inspect(name, thing):
    source = find_source(name)
    assert source.text == textwrap.dedent(inspect.getsource(thing)).rstrip("\n")
    assert source.line == inspect.getsourcelines(thing)[1]
    assert "".join(text for text, _ in mark_syntax(source.text)) == source.text


def test_a_constant_and_a_triton_kernel_are_found_without_an_import():
    assert find_source("minipeft.documents.VIRTUAL").text == "VIRTUAL = -2"
    kernel = find_source("minipeft_kernels.triton_kernels.shrink")
    assert kernel.text.startswith("@triton.jit")
    assert kernel.file == "kernels/minipeft_kernels/triton_kernels.py"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("minipeft.documents.invisible", "minipeft.documents defines no 'invisible'"),
        ("minipeft.documents.visible.inner", "defines no 'visible.inner'"),
        ("numpy.array", "no module of minipeft or minipeft_kernels holds 'numpy.array'"),
        ("minipeft", "no module of minipeft"),
    ],
)
def test_what_is_not_there_is_refused(name, said):
    with pytest.raises(InputError, match=said):
        find_source(name)


def test_kinds_of_syntax():
    kinds = {text: kind for text, kind in mark_syntax("@cache\ndef f(x):  # why\n    return 'a' if x else None, 1\n")}
    assert kinds["def"] == kinds["return"] == kinds["if"] == "keyword"
    assert (kinds["f"], kinds["# why"], kinds["'a'"], kinds["1"], kinds["@cache"]) == (
        "defined", "comment", "string", "number", "decorator")  # fmt: skip
