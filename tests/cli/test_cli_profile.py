"""`shohin profile`: the tables on the screen, and the page."""

from __future__ import annotations

from pathlib import Path

from cli_tasks import NET, invoke, write


def test_profile_prints_the_tables_and_draws_the_model(tmp_path: Path) -> None:
    task = write(tmp_path, NET + "torch.manual_seed(0)\nmodel, data = Net(8), shohin.Data(example=(torch.randn(2, 3, 8, 8),))", "small.py")
    done = invoke("profile", task, "--html", tmp_path / "out" / "small.html")
    assert done.exit_code == 0, done.output
    for word in ("ms measured", "MAC/byte", "Unit groups", "stem.0.weight", "body.0/conv2d.0", "Regions", "Frozen", "output of the model"):
        assert word in done.stdout
    page = (tmp_path / "out" / "small.html").read_text()
    assert page.startswith("<!doctype html>") and "stem.0.weight" in page and "<title>small" in page
