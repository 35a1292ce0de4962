import html.parser
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from samples import LATENCY, LAYERS, write_run

from shohin.report import card_text, collect, model_card, render

EVIL = "<img src=x onerror=\"document.title='owned'\"></script><script>document.title='owned'</script>'\"&{{7*7}}|<!--"
BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (found := shutil.which(name))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=5000",
]
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine; on Debian: apt-get install chromium")


class Page(html.parser.HTMLParser):
    """Counts elements, and keeps what is in script elements apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.outside: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes += attrs


def open_page(path: Path, profile: Path) -> tuple[str, list[str]]:
    """The document after its scripts ran, and what the page wrote to the console."""
    assert BROWSER is not None
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "DBUS_SESSION_BUS_ADDRESS")}
    done = subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={profile}", "--window-size=1280,900", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=90,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_browser
def test_the_browser_draws_the_page_without_an_error(tmp_path: Path) -> None:
    dom, console = open_page(render(collect(write_run(tmp_path / "run")), tmp_path / "report.html"), tmp_path / "profile")
    assert console == []
    body = dom[dom.index('<section class="hero">') : dom.index("<footer>")]
    assert len(re.findall(r'class="main-svg"', body)) >= 3, "three plots are drawn"
    assert len(re.findall(r'<path class="point"', body)) >= 2 * len(LATENCY) - 1, "candidates and predictions are drawn"
    for table, rows in (("candidates", len(LATENCY)), ("layers", len(LAYERS)), ("predictions", len(LATENCY) - 1), ("budget", 2)):
        found = re.search(rf'<table[^>]*id="{table}".*?</table>', body, re.S)
        assert found and found.group().count("<tr") == rows + 1
    assert "var:" not in body


@needs_browser
def test_the_browser_runs_nothing_that_came_from_outside(tmp_path: Path) -> None:
    dom, console = open_page(render(collect(write_run(tmp_path / "run", text=EVIL)), tmp_path / "report.html"), tmp_path / "profile")
    assert console == []
    assert "<title>owned" not in dom
    assert '<img src="x"' not in dom


@needs_browser
def test_an_error_of_the_page_would_be_seen(tmp_path: Path) -> None:
    page = render(collect(write_run(tmp_path / "run")), tmp_path / "report.html")
    page.write_text(page.read_text().replace('id="pareto"', 'id="elsewhere"'))
    assert open_page(page, tmp_path / "profile")[1]


@pytest.mark.parametrize("best", ["c03", "baseline"])
def test_words_from_outside_are_text(tmp_path: Path, best: str) -> None:
    texts = [
        render(collect(write_run(tmp_path / str(i), best=best, text=t)), tmp_path / f"{i}.html").read_text()
        for i, t in enumerate(("", EVIL))
    ]
    clean, evil = (Page(t) for t in texts)
    assert clean.tags == evil.tags
    assert not any(name.startswith("on") for name, _ in evil.attributes)
    assert "{{7*7}}" in texts[1]  # not evaluated as a template


def test_the_page_asks_nothing_of_the_network(tmp_path: Path) -> None:
    page = Page(render(collect(write_run(tmp_path / "run")), tmp_path / "report.html").read_text())
    linked = [v for name, v in page.attributes if name in ("src", "href") and v and not v.startswith("data:")]
    assert linked == []


@pytest.mark.parametrize(
    "report",
    [
        {},
        {"candidates": []},
        {"candidates": [{"name": "a"}], "best": "a", "baseline": "b"},
        {"baseline": "a", "candidates": [{"name": "a", "metrics": {"quality": {"value": float("nan")}, "latency_ms": {"value": 1.0}}}]},
        {"layers": {"a": [{}]}, "best": "a", "steps": {"a": [{}]}, "frozen": [{}], "predictions": [{"latency_ms": 1.0}]},
    ],
)
def test_whatever_is_missing_a_page_and_a_card_are_made(tmp_path: Path, report: dict[str, object]) -> None:
    assert "</html>" in render(report, tmp_path / "report.html").read_text()
    assert model_card(report, tmp_path / "model_card.md").read_text().startswith("# ")


def test_the_card_says_what_was_measured(tmp_path: Path) -> None:
    text = card_text(collect(write_run(tmp_path / "run")))
    assert "| c03 | 86.60 % | 83.60 % (1240/1484) | 0.440 ms | 0.34× |" in text
    assert "c01" not in text
    assert "median error 6.0 %" in text
    assert "`model.onnx` sha256" in text


def test_the_card_holds_words_from_outside_as_text(tmp_path: Path) -> None:
    clean, evil = (card_text(collect(write_run(tmp_path / str(i), text=t))) for i, t in enumerate(("", EVIL)))
    assert "<" not in evil
    assert clean.count("\n") == evil.count("\n")
    assert [line.replace("\\|", "").count("|") for line in clean.split("\n")] == [
        line.replace("\\|", "").count("|") for line in evil.split("\n")
    ]
