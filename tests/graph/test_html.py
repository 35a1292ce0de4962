"""The page: well formed, self-contained, escaped, and complete: every operation, group, region and reason is there."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shohin.graph import Frozen, Graph, understand_program
from shohin.graph.html import to_html
from shohin.program import capture, family
from shohin.surgery import understand
from surgery_checks import understood

VOID = {"meta", "link", "input", "br", "img", "path", "ellipse"}


class Page(HTMLParser):
    """Elements of a page: (tag, attributes), text, and whether all are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.stack: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.stack, f"not closed: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.stack and self.stack.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if not self.stack or self.stack[-1] not in ("style", "script"):
            self.words.append(data)

    def values(self, name: str) -> list[str]:
        """All values of an attribute."""
        return [a[name] for _, a in self.elements if name in a]


NAMES = ["resnet", "mobilenet", "vit fused", "grouped query", "unet", "recurrent", "unknown operator", "matrix", "windowed", "called twice"]


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_whole(name: str) -> None:
    _, graph = understood(name)
    text = to_html(graph, name)
    page = Page(text)
    operations = [
        graph.program.origins[n.name].address
        for n in graph.program.graph.nodes
        if n.op == "call_function" and family(n) not in ("getitem", "sym_size") and not isinstance(n.meta["val"], (int, torch.SymInt))
    ]
    shown = [a["title"] for _, a in page.elements if a.get("class") == "name" and "title" in a]
    assert shown == operations  # all of them, in program order
    legend = [a for tag, a in page.elements if tag == "li"]
    assert [a["data-g"] for a in legend] == [str(i) for i in range(len(graph.groups))]
    places = Counter(
        g for tag, a in page.elements if tag == "i" and "data-g" in a and "x" in a["class"].split() for g in a["data-g"].split()
    )
    assert set(places) == {str(i) for i in range(len(graph.groups))}
    for group in graph.groups:
        assert group.name in page.words
    brackets = [a["title"] for tag, a in page.elements if tag == "i" and a.get("class", "").startswith("rg") and "title" in a]
    assert {re.sub("^region (.*): can be skipped$", r"\1", b) for b in brackets} == {r.name for r in graph.regions}
    for note in graph.frozen:
        assert any(note.reason in t and note.line in t for t in page.values("title")), note


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_links_fit_and_nothing_is_fetched(name: str) -> None:
    _, graph = understood(name)
    text = to_html(graph)
    page = Page(text)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    links = [h for h in page.values("href") if not h.startswith("data:")]
    assert all(h.startswith("#") and h[1:] in ids for h in links)
    assert not page.values("src") and "@import" not in text and "url(" not in text
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert "fetch(" not in text and "XMLHttpRequest" not in text


def test_every_region_starts_and_ends_once() -> None:
    _, graph = understood("resnet")
    page = Page(to_html(graph))
    for region in graph.regions:
        mine = [a["class"].split() for tag, a in page.elements if tag == "i" and a.get("title") == f"region {region.name}: can be skipped"]
        assert mine[0].count("s") == 1 and sum("s" in c for c in mine) == 1
        assert sum("e" in c for c in mine) == 1 and "e" in mine[-1]


EVIL = "<img src=x onerror=alert(1)>\"'&"


def test_names_reasons_and_titles_are_escaped() -> None:
    class Evil(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))

    graph = understand_program(capture(Evil().eval(), (torch.randn(2, 3),)))
    (group,) = graph.groups
    frozen = (Frozen("first/linear.0", EVIL, EVIL), Frozen(EVIL, "reason", EVIL))
    origins = {n: replace(o, module=o.module.replace("first", EVIL)) for n, o in graph.program.origins.items()}
    program = replace(graph.program, origins=origins, input_names=(EVIL,))
    graph = with_group_named(replace(graph, program=program, frozen=frozen), group.name, EVIL)
    text = to_html(graph, EVIL)
    assert "<img" not in text and "onerror=alert(1)>" not in text
    page = Page(text)
    assert sum(EVIL in w for w in page.words) >= 5 and any(EVIL in t for t in page.values("title"))
    assert not any(k.startswith("on") for _, a in page.elements for k in a)


def with_group_named(graph: Graph, old: str, new: str) -> Graph:
    """The graph with another name for a group, in the costs too."""
    from shohin.graph import with_costs

    return with_costs(replace(graph, groups=tuple(replace(g, name=new) if g.name == old else g for g in graph.groups)))


class Deep(nn.Module):
    """Many blocks of a few operations each."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.Sigmoid(), nn.Tanh(), nn.Linear(4, 4)) for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize(("blocks", "opens"), [(3, True), (40, False)])
def test_large_models_are_closed_at_first(blocks: int, opens: bool) -> None:
    graph = understand_program(capture(Deep(blocks).eval(), (torch.randn(2, 4),)))
    text = to_html(graph)
    modules = [a for tag, a in Page(text).elements if tag == "details"]
    assert len(modules) == blocks and all(("open" in a) == opens for a in modules)
    assert len(text) < 60_000 + 10_000 * blocks


def test_an_axis_of_two_groups_names_both() -> None:
    _, graph = understood("vit fused")
    page = Page(to_html(graph))
    heads, dims = (g for g in graph.groups if "qkv" in g.name)
    both = [a for tag, a in page.elements if tag == "i" and "two" in a.get("class", "")]
    assert both and any(heads.name in a["title"] and f"{dims.name} ({dims.size} units)" in a["title"] for a in both)


def test_a_graph_writes_its_page(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = understand(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), (torch.randn(2, 3),))
    text = graph.to_html(tmp_path / "model.html", title="small")
    assert (tmp_path / "model.html").read_text() == text == graph.to_html(title="small") and "<title>small" in text
