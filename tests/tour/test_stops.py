"""The stops: what their text may hold, and what is refused with its line."""

import pytest

from minipeft.errors import InputError
from minipeft.tour.stops import FOLDER, read_stop, read_stops


def write(folder, text, title="# A stop\n"):
    file = folder / "01-stop.md"
    file.write_text(title + text)
    return file


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("the loss is 3.2 nats", "3.2"),
        ("a factor of 2", "2"),
        ("about `3.3` nats", "3.3"),
        ("`1,024 x 50` scores", "1,024 x 50"),
        ("hundreds of steps", "hundreds"),
        ("ten percent", "percent"),
        ("see [the 3rd stop](#x)", "3rd"),
        ("step2 of it", "step2"),
        ("in 2021, Hu et al. wrote it", "2021,"),
        ("GPT-3 is larger", "GPT-3"),
        ("{{loss}} and 7 more", "7"),
    ],
)
def test_a_number_that_is_not_computed_is_refused_with_its_line(tmp_path, text, found):
    with pytest.raises(InputError) as caught:
        read_stop(write(tmp_path, f"\nfine\n\n{text}\n"))
    assert f"01-stop.md: line 4: {found!r} is a number that is not computed" in str(caught.value)
    assert "write {{name}}" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "{{loss:.3f}} nats after {{steps}} steps",
        "GPT-2 in float32 and bfloat16 with (IA)3 and BLEU-4",
        "LoRA (Hu et al. 2021) and prefixes (Li & Liang 2021), their eq. 3 in section 4.3",
        "`lora_A [r, 16]` and `N(0, 1)` are code",
        "[a link](https://example.org/2024) to a page",
        "```math\ny = 2 x\n```",
    ],
)
def test_names_citations_code_and_equations_may_hold_digits(tmp_path, text):
    read_stop(write(tmp_path, f"\n{text}\n"))


def test_a_stop_is_split_into_blocks(tmp_path):
    stop = read_stop(
        write(tmp_path, "one {{a:.2f}}\n\n{{b:.1f}}\n```math\nx\n```\n{{source minipeft.documents.visible}}\ntwo\n")
    )
    assert [(b.kind, b.text, b.form) for b in stop.blocks] == [
        ("text", "one {{a:.2f}}", ""),
        ("value", "b", ".1f"),
        ("math", "x", ""),
        ("source", "minipeft.documents.visible", ""),
        ("text", "two", ""),
    ]
    assert stop.used() == {"a", "b"}
    assert (stop.number, stop.name, stop.title) == (1, "stop", "A stop")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```python\nx = 1\n```", "line 2: a block of 'python' would be pasted. Name the definition"),
        ("```math\nx", "line 2: ``` is not closed"),
        ("{{source}}\n{{what is this}}", "cannot read {{what is this}}"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, text, said):
    with pytest.raises(InputError) as caught:
        read_stop(write(tmp_path, text))
    assert said in str(caught.value)


def test_a_stop_needs_a_title(tmp_path):
    with pytest.raises(InputError, match="must begin with '# ' and a title"):
        read_stop(write(tmp_path, "text", title=""))


def test_the_stops_are_numbered_without_a_gap():
    stops = read_stops()
    assert [stop.number for stop in stops] == list(range(1, len(stops) + 1))
    assert len(stops) == len(list(FOLDER.glob("*.md"))) >= 20
