import json
import math
from pathlib import Path

import pytest
from samples import LATENCY, LAYERS, QUALITY, write_run

from shohin.errors import RunError
from shohin.report import collect, render
from shohin.report.figures import waterfall
from shohin.report.page import finite, headline, script_json
from shohin.report.tables import budget_table, candidate_table, layer_table, prediction_table
from shohin.report.words import Quality, count, milliseconds, number, size, times
from shohin.run import Run

PERCENT = Quality(list(QUALITY.values()), "accuracy")


def test_everything_in_the_folder_reaches_the_report(tmp_path: Path) -> None:
    report = collect(write_run(tmp_path / "run"))
    assert {c["name"] for c in report["candidates"]} == set(LATENCY)
    assert (report["best"], report["baseline"], report["finished"]) == ("c03", "baseline", True)
    assert [x["address"] for x in report["layers"]["c03"]] == LAYERS
    assert report["planning_note"] == "relinearized"
    assert (report["groups"], report["regions"]) == (7, 3)
    assert json.loads(json.dumps(report)) == report


def test_a_report_made_again_from_the_folder_is_the_same(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    first, second = (render(collect(Run(tmp_path / "run")), tmp_path / f"{i}.html").read_text() for i in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("budget", "met"), [("latency <= 0.5x, drop <= 0.01", [True, True]), ("latency <= 0.4 ms", [False]), ("drop <= 0.5 %", [False])]
)
def test_bounds_are_compared_with_what_was_reached(tmp_path: Path, budget: str, met: list[bool]) -> None:
    run = write_run(tmp_path / "run")
    run.config["budget"] = budget
    report = collect(run)
    assert [row["met"] for row in report["budget"]] == met
    assert [row["met"] for row in budget_table(report, PERCENT)] == met
    assert ("does not meet" in headline(report, PERCENT)) == (False in met)


def test_a_metric_where_less_is_better_turns_the_drop_round(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    run.config.update(lower_is_better=True, budget="drop <= 0.001")
    row = collect(run)["budget"][0]
    assert row["value"] == pytest.approx(QUALITY["c03"] - QUALITY["baseline"])
    assert row["met"]


def test_an_unreadable_budget_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    run.config["budget"] = "latency <= banana"
    assert collect(run)["budget"] == []


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    report = collect(write_run(tmp_path / "run", finished=False))
    assert not report["finished"]
    assert "best" not in report
    assert "not finished" in headline(report, PERCENT)


def test_when_the_original_stays_the_reasons_are_given(tmp_path: Path) -> None:
    report = collect(write_run(tmp_path / "run", best="baseline"))
    assert headline(report, PERCENT).startswith("The original stays")
    page = render(report, tmp_path / "page.html").read_text()
    assert "nothing was faster within the drop" in page


def test_a_damaged_candidate_is_an_error(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "run" / "candidates" / "c03" / "candidate.json").write_text('{"name": ')
    with pytest.raises(RunError, match=r"candidate\.json is damaged"):
        collect(run)


def test_prediction_errors(tmp_path: Path) -> None:
    table = prediction_table(collect(write_run(tmp_path / "run")))
    assert {r["name"]: r["error"] for r in table["rows"]}["c01"] == "+6.0 %"
    assert table["summary"] == "median error 6.0 %, worst 6.0 %"


def test_predictions_are_compared_as_ratios_to_the_original(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    table = prediction_table(collect(run))
    run.append("profile", "again", {"ms": [LATENCY["baseline"] / 1.5, 0.3]})
    slower = prediction_table(collect(run))
    assert table["rows"][0]["error"] == "+6.0 %"
    assert slower["rows"][0]["error"] == "+59.0 %"


def test_candidate_rows(tmp_path: Path) -> None:
    rows = {r["name"]: r for r in candidate_table(collect(write_run(tmp_path / "run")), PERCENT)}
    assert next(iter(rows)) == "baseline"
    assert rows["c03"]["ratio"] == "0.34×"
    assert rows["c03"]["change"] == "−0.60 points"
    assert rows["c03"]["test"] == "83.60 % (1240/1484)"
    assert rows["c03"]["format"] == f"int8 ×{len(LAYERS)}"
    assert rows["c03"]["roles"] == ["chosen", "front"]
    assert rows["c04"]["roles"] == []


def test_a_column_of_times_has_one_unit() -> None:
    fast = layer_table([{"address": "a", "ms_before": 0.004, "ms_after": 0.0}, {"address": "b", "ms_before": 0.5}])
    assert [x["before"] for x in fast] == ["4.0 µs", "500.0 µs"]
    slow = layer_table([{"address": "a", "ms_before": 0.4}, {"address": "b", "ms_before": 5.0}])
    assert [x["before"] for x in slow] == ["0.400 ms", "5.00 ms"]


def test_layer_rows_without_numbers() -> None:
    assert layer_table([]) == []
    (row,) = layer_table([{"address": "a"}])
    assert (row["width"], row["before"], row["bar_before"], row["changed"]) == ("–", "–", 0.0, False)


def test_steps_without_a_time_are_told_with_the_next_that_has_one() -> None:
    steps = [
        {"step": "start", "latency_ms": 1.0},
        *({"step": s} for s in ("prune", "compensate", "distill")),
        {"step": "quantize", "latency_ms": 0.4},
    ]
    figure = waterfall(steps, "latency_ms", PERCENT, "")
    assert figure is not None
    assert figure["data"][0]["x"] == ["original", "prune + quantize", "shipped"]
    recovered = [{"step": "start", "latency_ms": 1.0}, {"step": "prune"}, {"step": "distill", "latency_ms": 0.6}]
    figure = waterfall(recovered, "latency_ms", PERCENT, "")
    assert figure is not None
    assert figure["data"][0]["x"] == ["original", "prune", "shipped"]


def test_a_waterfall_needs_two_values_and_adds_up() -> None:
    assert waterfall([{"step": "start", "quality": 0.9}], "quality", PERCENT, "") is None
    figure = waterfall(
        [{"step": "start", "quality": 0.9}, {"step": "prune", "quality": 0.7}, {"step": "distill", "quality": 0.88}], "quality", PERCENT, ""
    )
    assert figure is not None
    assert sum(figure["data"][0]["y"]) == pytest.approx(88.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(0.0), "0"),
        (number(1234.56), "1,235"),
        (number(100.0), "100"),
        (number(1e-7), "1e-07"),
        (milliseconds(0.412), "0.412 ms"),
        (milliseconds(0.0031), "3.10 µs"),
        (milliseconds(1204.0), "1,204 ms"),
        (milliseconds(None), "–"),
        (size(512), "512 B"),
        (size(1_040_000), "1,016 KiB"),
        (count(13_100_000), "13.1 M"),
        (times(1.0, 3.0, "faster", "slower"), "3× faster"),
        (times(3.0, 1.0, "faster", "slower"), "3× slower"),
        (times(1.0, 1.0, "faster", "slower"), "unchanged"),
        (PERCENT.change(-0.006), "−0.60 points"),
        (Quality([31.2], "perplexity").text(31.2), "31.2"),
        (Quality([0.3, 0.4], "loss").text(0.3), "0.3"),
    ],
)
def test_words(text: str, expected: str) -> None:
    assert text == expected


def test_numbers_that_are_not_finite_become_unknown() -> None:
    assert finite({"a": [math.nan, 1.0, (math.inf,)]}) == {"a": [None, 1.0, [None]]}


@pytest.mark.parametrize("text", ["</script><script>", "<!--", "\u2028", "&amp;", "plain"])
def test_script_json_round_trips_without_a_mark_that_ends_the_script(text: str) -> None:
    written = script_json({text: text})
    assert json.loads(written) == {text: text}
    assert not any(mark in written for mark in "<>&\u2028\u2029")
