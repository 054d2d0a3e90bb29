"""Names for the demo's pairs: over a thousand, combined from two short lists, each name in one split only.

The test questions use other names than the training pairs, so that a model has to copy them. A name's hash decides its
split: one in eight is kept for the test questions and never occurs in training texts, neither in the pairs nor in the
demo model's pretraining (corpus.py).
"""

from __future__ import annotations

import hashlib
from functools import cache

NOUNS = """account address animal answer article asset author badge basket batch bill bird boat bond book booking bottle
box branch brand bridge budget bus buyer cable call camera campaign car card case cell chair channel chapter
charge check city claim client clock coach coin color column comment company contact contract cost count
country coupon course crate credit crop customer debt deposit desk device diary dish doctor dog donor door
draft dream driver email employee engine entry error event exam expense export farm fee field file film fine
fish flight floor flower folder food form friend fruit game garden gate gift goal grade grant group guest
guide habit hall harvest holiday horse hotel house idea image invoice island issue item job jury key label
lake lamp land leader league lease lesson letter level license light limit line list loan lock log lot machine
mail map mark market match meal meeting member memo menu message meter mile mirror model month motor movie
museum name nation nest network night note nurse object offer office order owner package page paint paper park
part partner patient payment pen person phone photo picture piece pilot pipe place plan planet plant plate
player plot poem point pool port post price print prize product profit project purchase query quest queue quiz
quote race rank rate reader receipt recipe record refund region rental report request result review reward
ride ring river road robot role room route row rule sale salary sample score screen season seat sector seller
sensor series server session shape share ship shirt shop show signal site size skill slot snack song source
speaker sport staff stage stamp star state station step stock stone store storm story street student study
subject suit survey table tag talk tank target task tax team tenant term test text theme ticket tile title
token tool tour tower town toy track trade trail train travel tree trial trip truck unit user value vehicle
vendor venue version video view visit visitor vote voter voyage wage wall ward watch wave week wheel window
wine word work worker yard year zone"""
MODIFIERS = """active all best big current daily early extra fast final first free fresh full home last late local long
main new next old open other paid past plain prime quick raw recent safe second short small sorted spare
sub temp top total valid weekly"""
KEPT_ONE_IN = 8


def is_kept(name: str) -> bool:
    """Whether a name is kept for the test questions."""
    return hashlib.sha256(f"name/{name}".encode()).digest()[0] % KEPT_ONE_IN == 0


def pluralize(noun: str) -> str:
    """orders, cities, boxes"""
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "z", "ch", "sh")) else "s")


def make_names() -> tuple[list[str], list[str]]:
    """Plural names (orders, open_orders) and singular names (price, best_price)."""
    many, one = [], []
    for noun in NOUNS.split():
        many += [pluralize(noun), *(f"{m}_{pluralize(noun)}" for m in _some(noun, "many"))]
        one += [noun, *(f"{m}_{noun}" for m in _some(noun, "one"))]
    return many, one


def _some(noun: str, kind: str) -> list[str]:
    """Three modifiers for a noun, chosen by its hash."""
    digest = hashlib.sha256(f"{kind}/{noun}".encode()).digest()
    modifiers = MODIFIERS.split()
    return list(dict.fromkeys(modifiers[byte % len(modifiers)] for byte in digest[:3]))


@cache
def split_names(test: bool) -> tuple[list[str], list[str]]:
    """The two lists of `make_names`, restricted to the test questions or to the other splits."""
    many, one = make_names()
    return [n for n in many if is_kept(n) is test], [n for n in one if is_kept(n) is test]
