"""The committed table."""

from __future__ import annotations

from statistics import median
from typing import Any


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a summary, then one line for each model."""
    lines = ["# Sweep", "", "Made by `make sweep`. Half width: half of the units of every group, in float64, against the oracle.", ""]
    lines += [
        "| family | models | cut | at most 70 % left | user's class | without program parts | wrong |",
        "|---|---|---|---|---|---|---|",
    ]
    families = list(dict.fromkeys(r["family"] for r in records))
    for family in [*families, "all"]:
        of = [r for r in records if family in (r["family"], "all")]
        done = [r for r in of if "ratio" in r and not r["wrong"] and not r["error"]]
        small = sum(r["ratio"] <= 0.70 for r in done)
        own = [r for r in done if r["form"] == "module"]
        strict = sum(not r["parts"] for r in own)
        lines.append(f"| {family} | {len(of)} | {len(done)} | {small} | {len(own)} | {strict} | {sum(bool(r['wrong']) for r in of)} |")
    shares = [r["understand_seconds"] / r["export_seconds"] for r in records if "understand_seconds" in r and r.get("export_seconds")]
    if shares:
        lines += ["", f"Labels, groups and trial rewriting take {median(shares):.2f} of the time of torch.export (median)."]
    lines += [
        "",
        "| model | parameters | groups | regions | left at half | form | oracle error | seconds: export, understand, cut | remark |",
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    lines += [_line(r) for r in sorted(records, key=lambda r: r["name"])]
    return "\n".join(lines) + "\n"


def _line(r: dict[str, Any]) -> str:
    remark = f"WRONG: {r['wrong']}" if r["wrong"] else r["error"] or r.get("reason", "")
    if r.get("parts"):
        remark = f"programs inside: {', '.join(r['parts'][:3])}{' ...' if len(r['parts']) > 3 else ''} {remark}".strip()
    if r.get("onnx", "ok") != "ok" and not r["wrong"]:
        remark = f"{remark} ONNX {r['onnx']}".strip()
    remark = "; ".join(t for t in (r["note"], remark) if t).replace("|", "/")[:160]
    seconds = ", ".join(str(r.get(k, "")) for k in ("export_seconds", "understand_seconds", "cut_seconds"))
    error = f"{r['max_oracle_error']:.0e}" if "max_oracle_error" in r else ""
    cells = [r["name"], r.get("parameters", ""), r.get("groups", ""), r.get("regions", ""), r.get("ratio", ""), r.get("form", "")]
    return "| " + " | ".join(map(str, [*cells, error, seconds, remark])) + " |"
