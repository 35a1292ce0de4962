"""Run folders written as a job writes them, with invented numbers: only what the page does with them is tested."""

import json
from pathlib import Path

from shohin.candidate import Measurement, Metrics
from shohin.plan import Plan
from shohin.run import Run, write_json

LATENCY = {"baseline": 1.31, "c01": 0.92, "c02": 0.63, "c03": 0.44, "c04": 0.71, "c05": 0.27}
QUALITY = {"baseline": 0.872, "c01": 0.874, "c02": 0.871, "c03": 0.866, "c04": 0.861, "c05": 0.842}
LAYERS = ["stem/conv.0", *(f"stages.{i}.{j}.{c}/conv.0" for i in range(3) for j in range(2) for c in ("first", "second")), "head/linear.0"]


def metrics(name: str) -> Metrics:
    """Numbers of one candidate."""
    scale = LATENCY[name] / LATENCY["baseline"]
    how = "measured: thread CPU time, minimum of 400 slices"
    return Metrics(
        quality=Measurement(QUALITY[name], "measured: on the file, 1,087 windows"),
        latency_ms=Measurement(LATENCY[name], how, {"batch": 1, "threads": 1}, spread=0.012),
        size_bytes=Measurement(1_040_000 * scale, "measured: bytes of the file"),
        memory_bytes=Measurement(7_800_000 * scale, "measured: peak resident growth"),
        macs=Measurement(13.1e6 * scale, "estimated: counted"),
        params=Measurement(254_000 * scale, "estimated: counted"),
    )


def write_run(folder: Path, *, best: str = "c03", finished: bool = True, text: str = "") -> Run:
    """A run folder. ``text`` is put wherever a user's words can get in."""
    run = Run(
        folder,
        {
            "model": "WatchNet" + text,
            "target": "onnxruntime" + text,
            "budget": "latency <= 0.5x, drop <= 0.01",
            "seed": 0,
            "time_limit": "8 min",
            "quality_name": "accuracy",
            "note": text,
        },
    )
    for name in LATENCY:
        plan = Plan("f" * 32, {"g0" + text: (0, 1, 2)}, (), {a: "int8" for a in LAYERS} if name in ("c02", "c03", "c05") else {})
        notes = {"form": "module", "why": text}
        if name in ("baseline", "c03"):
            notes["test"] = {"quality": QUALITY[name] - 0.03, "right": int(1484 * (QUALITY[name] - 0.03)), "of": 1484}
        data = {
            "name": name,
            "plan": plan.to_json(),
            "metrics": metrics(name).to_json(),
            "notes": notes,
            "checksums": {"model.onnx": "ab" * 32},
        }
        write_json(folder / "candidates" / name / "candidate.json", data)
    layers = [
        {"address": a, "kind": "conv", "width_before": 96, "macs": 1e6, "ms_before": 0.03 + 0.02 * (i % 5)} for i, a in enumerate(LAYERS)
    ]
    run.append(
        "capture",
        "",
        {
            "frozen": [{"address": "head/linear.0" + text, "reason": "its outputs are the model's outputs" + text}],
            "groups": 7,
            "regions": 3,
        },
    )
    run.append(
        "profile",
        "",
        {"layers": layers, "environment": {"cpu": "two cores" + text, "instruction_set": "avx2", "onnxruntime": "1.32.0", "threads": 1}},
    )
    run.append(
        "plan",
        "",
        {
            "predictions": [
                {"name": n, "latency_ms": v * (1.06 if i % 2 else 0.96)} for i, (n, v) in enumerate(LATENCY.items()) if n != "baseline"
            ],
            "note": "relinearized",
        },
    )
    if finished:
        steps = [
            ("start", 0.872, 1.31),
            ("prune", 0.701, 0.72),
            ("compensate", 0.832, 0.72),
            ("recalibrate", 0.846, 0.72),
            ("distill", 0.869, 0.72),
            ("quantize", 0.866, 0.44),
        ]
        after = [
            {**x, "width_after": 48, "format": "int8", "ms_after": x["ms_before"] * 0.35, "loss": 0.001 * (i + 1)}
            for i, x in enumerate(layers)
        ]
        result = {
            "best": best,
            "baseline": "baseline",
            "front": ["c05", "c03", "c02", "c01"],
            "reasons": ["nothing was faster within the drop" + text] if best == "baseline" else [],
            "steps": {"c03": [{"step": s, "quality": q, "latency_ms": ms} for s, q, ms in steps]},
            "layers": {"c03": after},
        }
        run.append("result", "", json.loads(json.dumps(result)))
    return run
