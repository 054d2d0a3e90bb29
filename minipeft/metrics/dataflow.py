"""CodeBLEU's fourth part: which value comes from where (Ren et al. 2020, section 3.3), by the rules of `DFG_python`.

Each token that is not an operator or a keyword is a *variable* (numbers, strings and attribute names too), and each one
is an item: where its value comes from.

    x = a + b        x computedFrom [a, b]
    y = x            x comesFrom [x], the x one line up; y computedFrom [x]

Names do not count: variables are numbered in the order in which items mention them, an item's sources before itself, so
the same flow under other names gives the same items. Items without sources that are nobody's source are left out.

The walk reads a block as it runs: `known` says for each name which tokens it may come from at this point. A loop's body
is read twice, so that what the end of the body sets is seen at its start; a branch starts from what was known before
the `if`, and afterwards a name may come from any branch.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

from minipeft.metrics.grammar import Node, Tree
from minipeft.metrics.syntax import shorten

# The codebleu package recurses, and reports no data flow where that hits Python's limit of 1,000 frames.
DEEPEST = 950
# What a flow may cost, in sources written: a guard against texts of which each token is linked with each other.
MOST_SOURCES = 1_000_000

Places = frozenset[int]
Walk = Generator["Walk", None, None]  # a rule of the walk: yields the walks that must run before it goes on


class TooMuch(Exception):
    """The text asks for more than MOST_SOURCES."""


class Malformed(Exception):
    """A rule finds no token where it needs one, in a broken tree mostly: the package gives up on the whole text."""


@dataclass(slots=True)
class Flow:
    """One item before it is numbered: the token `place` with this `name` has its value from `sources`."""

    place: int
    name: str
    relation: str  # "comesFrom" or "computedFrom"
    names: tuple[str, ...]  # of its sources
    sources: Places


@dataclass(slots=True)
class Scope:
    """What is known while the text is read, what was written down, and the way back to an earlier point."""

    flows: list[Flow] = field(default_factory=list)
    known: dict[str, Places] = field(default_factory=dict)
    undo: list[tuple[str, Places | None]] = field(default_factory=list)
    loops: int = 0  # that the walk is in
    cost: int = 0
    names: dict[Node, list[str]] = field(default_factory=dict)  # of each loop
    seen: dict[tuple[Node, tuple[Places | None, ...]], tuple[list[Flow], dict[str, Places]]] = field(
        default_factory=dict
    )

    def set(self, name: str, places: Places) -> None:
        """From here on, `name` comes from these places."""
        self.undo.append((name, self.known.get(name)))
        self.known[name] = places

    def add(self, leaf: Node, relation: str, names: tuple[str, ...], sources: Places) -> None:
        """Write one item down."""
        self.cost += 1 + len(names)
        if self.cost > MOST_SOURCES:
            raise TooMuch
        self.flows.append(Flow(leaf.leaf, leaf.token, relation, names, sources))

    def extend(self, flows: list[Flow]) -> None:
        """Write down what a loop came to."""
        self.cost += sum(1 + len(flow.names) for flow in flows)
        if self.cost > MOST_SOURCES:
            raise TooMuch
        self.flows.extend(flows)

    def changes(self, mark: int) -> dict[str, Places]:
        """What was set since the undo log was `mark` long."""
        return {name: self.known[name] for name, _ in self.undo[mark:]}

    def go_back(self, mark: int) -> None:
        """Forget what was set since then."""
        for name, places in reversed(self.undo[mark:]):
            if places is None:
                del self.known[name]
            else:
                self.known[name] = places
        del self.undo[mark:]


def count_flows(tree: Tree) -> tuple[Counter[str], bool]:
    """Count the numbered items of a text, and say whether a limit was hit (then there are none)."""
    if tree.depth > DEEPEST:
        return Counter(), True
    scope = Scope()
    walks = [_read(tree.nodes[0], scope)]
    try:
        while walks:  # a stack of our own: a deep text must not meet Python's recursion limit
            try:
                walks.append(next(walks[-1]))
            except StopIteration:
                walks.pop()
        return Counter(_number(scope.flows)), False
    except Malformed:
        return Counter(), False
    except TooMuch:
        return Counter(), True


def _read(node: Node, scope: Scope) -> Walk:
    """Read what is below a node from left to right, the `for ... in` of a comprehension before its siblings."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node.leaf >= 0:
            _read_leaf(node, scope)
        elif node.kind in RULES:
            yield RULES[node.kind](node, scope)
        else:
            first = [child for child in node.children if child.kind == "for_in_clause"]
            if first:
                waiting.extend(reversed([child for child in node.children if child.kind != "for_in_clause"]))
                waiting.extend(reversed(first))
            else:
                waiting.extend(reversed(node.children))


def _read_leaf(leaf: Node, scope: Scope) -> None:
    """A known name comes from where it was set; an unknown identifier is set here."""
    if leaf.kind == leaf.token:
        return  # an operator or a keyword
    places = scope.known.get(leaf.token)
    if places is not None:
        scope.add(leaf, "comesFrom", (leaf.token,), places)
        return
    scope.add(leaf, "comesFrom", (), frozenset())
    if leaf.kind == "identifier":
        scope.set(leaf.token, frozenset([leaf.leaf]))


def _read_default(node: Node, scope: Scope) -> Walk:
    """`name=value` in a parameter list: the name comes from each token of its value."""
    name, value = _part(node, "name"), _part(node, "value")
    if name is None:
        raise Malformed
    if value is None:
        for leaf in _variables(name):
            scope.add(leaf, "comesFrom", (), frozenset())
            scope.set(leaf.token, frozenset([leaf.leaf]))
        return
    yield _read(value, scope)
    sources = list(_variables(value))
    for leaf in _variables(name):
        for source in sources:
            scope.add(leaf, "comesFrom", (source.token,), frozenset([source.leaf]))
        scope.set(leaf.token, frozenset([leaf.leaf]))


def _read_assignment(node: Node, scope: Scope) -> Walk:
    """`left = right`: right is read, then left is computed from it, piece by piece where both have as many pieces."""
    if _part(node, "right") is None:
        return
    yield from _bind(*_pieces(node), scope)


def _read_clause(node: Node, scope: Scope) -> Walk:
    """`for left in right` of a comprehension; right is whatever comes last."""
    left = _part(node, "left")
    if left is None:
        raise Malformed
    yield from _bind([left], [node.children[-1]], scope)


def _bind(lefts: list[Node], rights: list[Node], scope: Scope) -> Walk:
    """Read each right piece, then let each variable of a left piece be computed from those of its right piece."""
    for right in rights:
        yield _read(right, scope)
    for left, right in zip(lefts, rights):
        variables = list(_variables(right))
        names = tuple(leaf.token for leaf in variables)
        sources = frozenset(leaf.leaf for leaf in variables)
        for leaf in _variables(left):
            scope.add(leaf, "computedFrom", names, sources)
            scope.set(leaf.token, frozenset([leaf.leaf]))


def _read_branches(node: Node, scope: Scope) -> Walk:
    """`if`: the condition and the first body, then each elif and else from what was known before the `if`."""
    branches: list[dict[str, Places]] = []
    mark = len(scope.undo)
    complete = False
    for child in node.children:
        complete = complete or "else" in child.kind
        if child.kind not in ("elif_clause", "else_clause"):
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


def _read_for(node: Node, scope: Scope) -> Walk:
    """`for left in right: body`, twice; a body that an `else` follows is not read (it is not the last child)."""
    lefts, rights = _pieces(node)
    body = node.children[-1]

    def once() -> Walk:
        yield from _bind(lefts, rights, scope)
        if body.kind == "block":
            yield _read(body, scope)

    yield from _twice(node, scope, once)


def _read_while(node: Node, scope: Scope) -> Walk:
    """`while`: the condition and everything below it, twice."""

    def once() -> Walk:
        for child in node.children:
            yield _read(child, scope)

    yield from _twice(node, scope, once)


def _twice(node: Node, scope: Scope, once: Callable[[], Walk]) -> Walk:
    """Read a loop twice and join what both passes found.

    In a nest, each level would double the work of the one below. But the second pass mostly meets what the first one
    met, so an inner loop is read only once for each state of the names that it mentions.
    """
    key = None
    if scope.loops:
        if node not in scope.names:
            scope.names[node] = list(dict.fromkeys(leaf.token for leaf in _variables(node)))
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
    """Make one item of those with equal keys: the last one's name and relation, each source name once, as first met."""
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


def _pieces(node: Node) -> tuple[list[Node], list[Node]]:
    """The two sides of a binding: their children without commas, if there are as many of both, else each as a whole."""
    left, right = _part(node, "left"), _part(node, "right")
    if left is None or right is None:
        raise Malformed
    lefts = [child for child in left.children if child.kind != ","]
    rights = [child for child in right.children if child.kind != ","]
    if not len(lefts) == len(rights) > 0:
        return [left], [right]
    if left.leaf >= 0 or right.leaf >= 0:
        raise Malformed  # the pieces of a string (a quote, the inside, a quote) are no tokens: there is no flow at all
    return lefts, rights


def _part(node: Node, name: str) -> Node | None:
    """The first child in this field."""
    return next((child for child in node.children if child.field == name), None)


def _variables(node: Node) -> Iterator[Node]:
    """The tokens below a node that are not operators or keywords, from left to right."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node.leaf < 0:
            waiting.extend(reversed(node.children))
        elif node.kind != node.token:
            yield node


RULES: dict[str, Callable[[Node, Scope], Walk]] = {
    "default_parameter": _read_default,
    "assignment": _read_assignment,
    "augmented_assignment": _read_assignment,
    "for_in_clause": _read_clause,
    "if_statement": _read_branches,
    "for_statement": _read_for,
    "while_statement": _read_while,
}
