"""CodeBLEU's fourth part: data flow (Ren et al. 2020, section 3.3), by the rules of the package's `DFG_python`.

Each token that is not an operator or a keyword is a *variable* (numbers, strings and attribute names too), and each
variable has an item that lists the sources of its value.

    x = a + b        x computedFrom [a, b]
    y = x            x comesFrom [x], the x one line up; y computedFrom [x]

Names are irrelevant: variables are numbered in the order in which items mention them, an item's sources before itself,
so the same flow under other names gives the same items. Items that have no source and are no source are dropped.

The walk follows the order of execution: `known` maps each name to the tokens that it may come from at this point. A
loop's body is read twice, so that assignments at its end reach its start; each branch starts from the state before the
`if`, and afterwards a name may come from any branch.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

from minipeft.metrics.grammar import Tree
from minipeft.metrics.syntax import shorten

# The codebleu package recurses, and reports no data flow where it hits Python's limit of 1,000 frames.
DEEPEST = 950
# Limit on the number of sources of a text, for texts in which every token is linked to every other.
MOST_SOURCES = 1_000_000

Places = frozenset[int]
NOWHERE: Places = frozenset()
Walk = Generator["Walk", None, None]  # a rule of the walk: yields the walks that must finish before it continues


class TooMuch(Exception):
    """The text exceeds MOST_SOURCES."""


class Malformed(Exception):
    """A rule lacks a token that it needs, mostly in a broken tree; the package then reports no data flow at all."""


@dataclass(slots=True)
class Flow:
    """One item before numbering: the token at `place` with this `name` gets its value from `sources`."""

    place: int
    name: str
    relation: str  # "comesFrom" or "computedFrom"
    names: tuple[str, ...]  # of its sources
    sources: Places


@dataclass(slots=True)
class Scope:
    """The state of the walk: the known names, the items found, and an undo log."""

    tree: Tree
    variables: list[int]  # the nodes that are variables, in the order of the text
    flows: list[Flow] = field(default_factory=list)
    known: dict[str, Places] = field(default_factory=dict)
    undo: list[tuple[str, Places | None]] = field(default_factory=list)
    loops: int = 0  # that the walk is in
    cost: int = 0
    names: dict[int, list[str]] = field(default_factory=dict)  # of each loop
    seen: dict[tuple[int, tuple[Places | None, ...]], tuple[list[Flow], dict[str, Places]]] = field(
        default_factory=dict
    )

    def below(self, node: int) -> list[int]:
        """The variables below a node, or the node itself if it is one."""
        start = bisect_left(self.variables, node)
        return self.variables[start : bisect_left(self.variables, self.tree.ends[node], start)]

    def part(self, node: int, name: str) -> int | None:
        """The first child with this field."""
        return next((child for child in self.tree.children(node) if self.tree.fields[child] == name), None)

    def set(self, name: str, places: Places) -> None:
        """From here on, `name` comes from these places."""
        self.undo.append((name, self.known.get(name)))
        self.known[name] = places

    def bind(self, node: int) -> None:
        """From here on, the variable `node` comes from its own place."""
        self.set(self.tree.tokens[node], frozenset([self.tree.places[node]]))

    def add(self, node: int, relation: str, names: tuple[str, ...], sources: Places) -> None:
        """Record one item."""
        self.cost += 1 + len(names)
        if self.cost > MOST_SOURCES:
            raise TooMuch
        self.flows.append(Flow(self.tree.places[node], self.tree.tokens[node], relation, names, sources))

    def extend(self, flows: list[Flow]) -> None:
        """Record the items of a loop."""
        self.cost += sum(1 + len(flow.names) for flow in flows)
        if self.cost > MOST_SOURCES:
            raise TooMuch
        self.flows.extend(flows)

    def changes(self, mark: int) -> dict[str, Places]:
        """The names set since the undo log was `mark` long."""
        return {name: self.known[name] for name, _ in self.undo[mark:]}

    def go_back(self, mark: int) -> None:
        """Undo what was set since then."""
        for name, places in reversed(self.undo[mark:]):
            if places is None:
                del self.known[name]
            else:
                self.known[name] = places
        del self.undo[mark:]


def count_flows(tree: Tree) -> tuple[Counter[str], bool]:
    """Count the numbered items of a text; the flag says whether a limit was exceeded (then there are no items)."""
    if tree.depth > DEEPEST:
        return Counter(), True
    tokens = zip(tree.places, tree.kinds, tree.tokens)
    variables = [node for node, (place, kind, token) in enumerate(tokens) if place >= 0 and kind != token]
    scope = Scope(tree, variables)
    walks = [_read(0, scope)]
    try:
        while walks:  # an explicit stack: a deep text must not hit Python's recursion limit
            try:
                walks.append(next(walks[-1]))
            except StopIteration:
                walks.pop()
        return Counter(_number(scope.flows)), False
    except Malformed:
        return Counter(), False
    except TooMuch:
        return Counter(), True


def _read(node: int, scope: Scope) -> Walk:
    """Read a node and its descendants from left to right, the `for ... in` of a comprehension before its siblings."""
    tree, end = scope.tree, scope.tree.ends[node]
    while node < end:
        if tree.places[node] >= 0:
            _read_leaf(node, scope)
        elif tree.kinds[node] in RULES:
            yield RULES[tree.kinds[node]](node, scope)
        elif node in tree.clauses:
            children = tree.children(node)
            for child in sorted(children, key=lambda child: tree.kinds[child] != "for_in_clause"):
                yield _read(child, scope)
        else:
            node += 1  # go down
            continue
        node = tree.ends[node]


def _read_leaf(node: int, scope: Scope) -> None:
    """A known name comes from its assignments; an unknown identifier is assigned here."""
    kind, token = scope.tree.kinds[node], scope.tree.tokens[node]
    if kind == token:
        return  # an operator or a keyword
    places = scope.known.get(token)
    if places is not None:
        scope.add(node, "comesFrom", (token,), places)
        return
    scope.add(node, "comesFrom", (), NOWHERE)
    if kind == "identifier":
        scope.bind(node)


def _read_default(node: int, scope: Scope) -> Walk:
    """`name=value` in a parameter list: the name comes from each token of its value."""
    name, value = scope.part(node, "name"), scope.part(node, "value")
    if name is None:
        raise Malformed
    if value is None:
        for leaf in scope.below(name):
            scope.add(leaf, "comesFrom", (), NOWHERE)
            scope.bind(leaf)
        return
    yield _read(value, scope)
    tree = scope.tree
    for leaf in scope.below(name):
        for source in scope.below(value):
            scope.add(leaf, "comesFrom", (tree.tokens[source],), frozenset([tree.places[source]]))
        scope.bind(leaf)


def _read_assignment(node: int, scope: Scope) -> Walk:
    """`left = right`: right is read, then left is computed from it, piece by piece where both have as many pieces."""
    if scope.part(node, "right") is None:
        return
    yield from _bind(*_pieces(node, scope), scope)


def _read_clause(node: int, scope: Scope) -> Walk:
    """`for left in right` of a comprehension; right is the last child."""
    left = scope.part(node, "left")
    if left is None:
        raise Malformed
    yield from _bind([left], scope.tree.children(node)[-1:], scope)


def _bind(lefts: list[int], rights: list[int], scope: Scope) -> Walk:
    """Read each right piece, then let each variable of a left piece be computed from those of its right piece."""
    for right in rights:
        yield _read(right, scope)
    tree = scope.tree
    for left, right in zip(lefts, rights):
        variables = scope.below(right)
        names = tuple(tree.tokens[leaf] for leaf in variables)
        sources = frozenset(tree.places[leaf] for leaf in variables)
        for leaf in scope.below(left):
            scope.add(leaf, "computedFrom", names, sources)
            scope.bind(leaf)


def _read_branches(node: int, scope: Scope) -> Walk:
    """`if`: the condition and the first body, then each elif and else from what was known before the `if`."""
    branches: list[dict[str, Places]] = []
    mark = len(scope.undo)
    complete = False
    for child in scope.tree.children(node):
        kind = scope.tree.kinds[child]
        complete = complete or "else" in kind
        if kind not in ("elif_clause", "else_clause"):
            yield _read(child, scope)
            continue
        first = scope.changes(mark)
        scope.go_back(mark)
        yield _read(child, scope)
        branches.append(scope.changes(mark))
        scope.go_back(mark)
        for name, places in first.items():
            scope.set(name, places)
    branches.append(scope.changes(mark))
    scope.go_back(mark)
    if not complete:
        branches.append({})
    for name in dict.fromkeys(name for branch in branches for name in branch):
        before = scope.known.get(name, frozenset())
        scope.set(name, frozenset().union(*(branch.get(name, before) for branch in branches)))


def _read_for(node: int, scope: Scope) -> Walk:
    """`for left in right: body`, twice; a body that an `else` follows is not read (it is not the last child)."""
    lefts, rights = _pieces(node, scope)
    body = scope.tree.children(node)[-1]

    def once() -> Walk:
        yield from _bind(lefts, rights, scope)
        if scope.tree.kinds[body] == "block":
            yield _read(body, scope)

    yield from _twice(node, scope, once)


def _read_while(node: int, scope: Scope) -> Walk:
    """`while`: the condition and everything below it, twice."""

    def once() -> Walk:
        for child in scope.tree.children(node):
            yield _read(child, scope)

    yield from _twice(node, scope, once)


def _twice(node: int, scope: Scope, once: Callable[[], Walk]) -> Walk:
    """Read a loop twice and join what both passes found.

    In nested loops each level would double the work below it. But the second pass mostly sees the same state as the
    first, so an inner loop is read only once for each state of the names in it.
    """
    key = None
    if scope.loops:
        if node not in scope.names:
            scope.names[node] = list(dict.fromkeys(scope.tree.tokens[leaf] for leaf in scope.below(node)))
        key = (node, tuple(scope.known.get(name) for name in scope.names[node]))
        if key in scope.seen:
            flows, changes = scope.seen[key]
            scope.extend(flows)
            for name, places in changes.items():
                scope.set(name, places)
            return
    outside, scope.flows, mark = scope.flows, [], len(scope.undo)
    scope.loops += 1
    yield from once()
    yield from once()
    scope.loops -= 1
    flows, scope.flows = _join(scope.flows, lambda flow: (flow.place, flow.name, flow.relation)), outside
    scope.extend(flows)
    if key is not None:
        scope.seen[key] = (flows, scope.changes(mark))


def _join(flows: list[Flow], key: Callable[[Flow], object]) -> list[Flow]:
    """Merge items with equal keys: the last one's name and relation, each source name once, in order of appearance."""
    joined: dict[object, Flow] = {}
    for flow in flows:
        here = key(flow)
        earlier = joined.get(here)
        if earlier is None:
            joined[here] = flow
        else:
            names = tuple(dict.fromkeys(earlier.names + flow.names))
            joined[here] = Flow(flow.place, flow.name, flow.relation, names, earlier.sources | flow.sources)
    return list(joined.values())


def _number(flows: list[Flow]) -> Iterator[str]:
    """The items as text, variables numbered: "2 computedFrom 0 1". Joined by place; in the order of the places."""
    linked = set().union(*(flow.sources for flow in flows), (flow.place for flow in flows if flow.sources))
    kept = sorted((flow for flow in flows if flow.place in linked), key=lambda flow: flow.place)
    numbers: dict[str, int] = {}
    for flow in _join(kept, lambda flow: flow.place):
        sources = [numbers.setdefault(name, len(numbers)) for name in flow.names]
        own = numbers.setdefault(flow.name, len(numbers))
        yield shorten(f"{own} {flow.relation} {' '.join(map(str, sources))}")


def _pieces(node: int, scope: Scope) -> tuple[list[int], list[int]]:
    """The two sides of a binding: their children without commas, if there are as many of both, else each as a whole."""
    left, right, tree = scope.part(node, "left"), scope.part(node, "right"), scope.tree
    if left is None or right is None:
        raise Malformed
    lefts = [child for child in tree.children(left) if tree.kinds[child] != ","]
    rights = [child for child in tree.children(right) if tree.kinds[child] != ","]
    if not len(lefts) == len(rights) > 0:
        return [left], [right]
    if tree.places[left] >= 0 or tree.places[right] >= 0:
        raise Malformed  # the pieces of a string (a quote, the inside, a quote) are no tokens: there is no flow at all
    return lefts, rights


RULES: dict[str, Callable[[int, Scope], Walk]] = {
    "default_parameter": _read_default,
    "assignment": _read_assignment,
    "augmented_assignment": _read_assignment,
    "for_in_clause": _read_clause,
    "if_statement": _read_branches,
    "for_statement": _read_for,
    "while_statement": _read_while,
}
