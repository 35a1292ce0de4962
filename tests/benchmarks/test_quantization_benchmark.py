"""The int8 benchmark: what is timed again, and what its table and its verdicts say of files in LiteRT and of failures."""

from pathlib import Path
from typing import Any

from quantizing.integers import AI_EDGE, NNCF, OURS, table, untimed, verdicts

STATIC, _, DYNAMIC = AI_EDGE
MINE = OURS["openvino"]


def record(method: str, snr: float, **more: Any) -> dict[str, Any]:
    """One run."""
    judged = {"snr": snr, "agree": 0.99}
    return {"model": "net", "method": method, "bytes": 1_000_000, "seconds": 2.0, "megabytes": 10.0, "judged": judged, **more}


def records() -> list[dict[str, Any]]:
    """Of three runs, and of one that failed."""
    failed = {"model": "net", "method": STATIC, "failed": "not converted: ValueError: no | such operator"}
    return [record(MINE, 30.0), record(NNCF[0], 20.0), record(DYNAMIC, 40.0, latency={"ratio": 0.25}), failed]


def times() -> dict[str, Any]:
    """Of the files of one runtime."""
    return {"net": {MINE: {"ratio": 0.4}, NNCF[0]: {"ratio": 0.5}}}


def test_files_in_litert_are_peers_in_fidelity_alone() -> None:
    said = verdicts(records(), times())["net, openvino"]
    assert said["fidelity"] == {"db": 30.0, "peer": NNCF[0], "peer_db": 20.0, "met": True, "of_all": DYNAMIC, "of_all_db": 40.0}
    assert said["peer"] == {"ratio": 0.8, "peer": NNCF[0], "met": True}


def test_the_table_shows_latencies_of_records_and_reasons_of_failures() -> None:
    rows = {line.split("|")[1].strip(): line for line in table(records(), times()).splitlines() if line.startswith("| ")}
    assert "| 0.250 |" in rows[DYNAMIC]
    assert "failed: not converted: ValueError: no / such operator" in rows[STATIC]
    assert {line.count("|") for line in rows.values()} == {8}


def test_only_runtimes_with_new_files_are_timed(tmp_path: Path) -> None:
    (tmp_path / "nncf-openvino.xml").touch()
    names = (*OURS.values(), NNCF[0], DYNAMIC)
    assert untimed(tmp_path, names, {NNCF[0]: {}}, {DYNAMIC}) == []
    assert untimed(tmp_path, names, {}, set()) == ["openvino"]
    assert untimed(tmp_path, names, {NNCF[0]: {}}, {OURS["onnxruntime"]}) == ["onnxruntime"]
