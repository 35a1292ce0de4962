"""Rows nested by module path, and the brackets of the regions beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from shohin.graph.html.rows import Row

#: rows that are open when the page is opened; deeper modules are closed
VISIBLE = 110


@dataclass
class Block:
    """The operations of one run of a module.

    Args:
        path: of the module; "" is the model.
        name: what is shown: the path below the surrounding block.
        kind: class name of the module, or "".
        items: blocks and operations in program order.
        open: whether it is open at first.
        brackets: as for `Item`.
    """

    path: str
    name: str = ""
    kind: str = ""
    items: list[Block | Item] = field(default_factory=list)
    open: bool = False
    depth: int = 0
    brackets: list[Bracket] = field(default_factory=list)

    def rows(self) -> Iterator[Row]:
        """All operations inside."""
        for item in self.items:
            if isinstance(item, Block):
                yield from item.rows()
            else:
                yield item.row


@dataclass
class Item:
    """An operation in a block: its name there, and the brackets beside it."""

    row: Row
    name: str
    depth: int = 0
    brackets: list[Bracket] = field(default_factory=list)


@dataclass(frozen=True)
class Bracket:
    """A piece of a region's bracket: the region, its lane, and whether it starts or ends here (or ends while the block is closed)."""

    region: int
    lane: int
    starts: bool
    ends: bool
    ends_closed: bool = False


def tree_of(rows: Sequence[Row], kinds: Mapping[str, str], regions: int) -> Block:
    """The model as nested blocks.

    Args:
        kinds: module path -> class name.
        regions: number of regions.
    """
    root = Block("")
    stack = [root]
    for row in rows:
        while not _within(row.module, stack[-1].path):
            stack.pop()
        for path in _steps(stack[-1].path, row.module):
            block = Block(path, kind=kinds.get(path, ""))
            stack[-1].items.append(block)
            stack.append(block)
        stack[-1].items.append(Item(row, ""))
    root = _simple(root)
    _name(root, 0)
    _open(root)
    _brackets(root, rows, regions)
    return root


def _within(path: str, above: str) -> bool:
    return not above or path == above or path.startswith(f"{above}.")


def _steps(above: str, path: str) -> list[str]:
    parts = path.split(".") if path else []
    start = len(above.split(".")) if above else 0
    return [".".join(parts[: i + 1]) for i in range(start, len(parts))]


def _simple(block: Block) -> Block:
    """Without blocks that hold one operation, and without containers that run none themselves."""
    items: list[Block | Item] = []
    for item in block.items:
        if isinstance(item, Block):
            inner = _simple(item)
            if len(inner.items) == 1 or all(isinstance(i, Block) for i in inner.items):
                items += inner.items
            else:
                items.append(inner)
        else:
            items.append(item)
    block.items = items
    return block


def _name(block: Block, depth: int) -> None:
    for item in block.items:
        path = item.path if isinstance(item, Block) else item.row.module
        item.name = path.removeprefix(block.path).lstrip(".")
        item.depth = depth
        if isinstance(item, Block):
            _name(item, depth + 1)


def _open(root: Block) -> None:
    """Opens blocks, the outer ones first, until enough rows are seen; blocks of one level are treated alike."""
    root.open = True
    seen, level = len(root.items), [i for i in root.items if isinstance(i, Block)]
    while level and seen + sum(len(b.items) for b in level) <= VISIBLE:
        seen += sum(len(b.items) for b in level)
        for block in level:
            block.open = True
        level = [i for b in level for i in b.items if isinstance(i, Block)]


def _brackets(root: Block, rows: Sequence[Row], regions: int) -> None:
    inside: list[set[int]] = [set() for _ in range(regions)]
    for row in rows:
        for region in row.regions:
            inside[region].add(row.number)
    lanes = _lanes(inside)
    begun: set[int] = set()

    def visit(block: Block) -> None:
        for item in block.items:
            own = {r.number for r in item.rows()} if isinstance(item, Block) else {item.row.number}
            for region, members in enumerate(inside):
                if members and own <= members:
                    last = max(members) in own
                    is_block = isinstance(item, Block)
                    item.brackets.append(Bracket(region, lanes[region], region not in begun, last and not is_block, last and is_block))
                    begun.add(region)
            if isinstance(item, Block):
                visit(item)

    visit(root)


def _lanes(inside: Sequence[set[int]]) -> list[int]:
    """Regions that overlap are drawn beside each other."""
    lanes: list[int] = []
    for i, members in enumerate(inside):
        taken = {lanes[j] for j in range(i) if members and inside[j] and min(members) <= max(inside[j]) and min(inside[j]) <= max(members)}
        lanes.append(next(n for n in range(len(inside) + 1) if n not in taken))
    return lanes
