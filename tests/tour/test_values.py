"""Values in the text, and sentences that must hold."""

import pytest

from minipeft.errors import InputError
from minipeft.tour.values import claim, show


def test_numbers_are_formatted_for_the_text():
    assert [show(n) for n in (1234567, 0.123456, 12.0, "text")] == ["1,234,567", "0.123", "12", "text"]
    assert show(0.5, ".2f") == "0.50"


def test_a_sentence_that_does_not_hold_stops_the_build():
    claim(True, "all is well")
    with pytest.raises(InputError, match=r"the numbers do not show that text wins\. Correct the stop's text"):
        claim(False, "text wins")
