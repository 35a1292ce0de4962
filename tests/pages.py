"""Python in the pages of documentation, run as it stands there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"


@dataclass(frozen=True)
class Block:
    """A fenced block of Python.

    Args:
        text: of its lines.
        line: of the page, where the text begins.
    """

    page: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def run(self, names: dict[str, Any]) -> None:
        """Executes it; what it defines goes into ``names``. A traceback names the page's own line."""
        exec(compile("\n" * (self.line - 1) + self.text, str(DOCS / self.page), "exec"), names)


def blocks(page: str) -> list[Block]:
    """The Python blocks of a page in their order."""
    text = (DOCS / page).read_text("utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(page, m.group(1), text.count("\n", 0, m.start()) + 2) for m in found]
