"""Names for the demo's pairs: no Python keyword, no name in two splits, English plurals."""

import keyword

from minipeft.demo.names import is_kept, make_names, pluralize, split_names


def test_plurals():
    assert [pluralize(noun) for noun in ("order", "city", "box", "day", "branch", "class")] == [
        "orders", "cities", "boxes", "days", "branches", "classes",
    ]  # fmt: skip


def test_each_name_is_one_and_has_one_split():
    many, one = make_names()
    assert len(set(many) | set(one)) == len(many) + len(one) > 2500
    assert not [name for name in many + one if keyword.iskeyword(name) or not name.isidentifier()]
    for mine, whole in zip(zip(split_names(False), split_names(True)), (many, one)):
        train, test = mine
        assert sorted(train + test) == sorted(whole)
        assert not set(train) & set(test)
        assert len(test) > 100
    assert is_kept(split_names(True)[0][0])
