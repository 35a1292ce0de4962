"""Names of targets, what is installed, and the processor."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json

import pytest

from shohin.errors import TargetError
from shohin.targets import Target, cpu, get_target, list_targets
from shohin.targets import registry as registry

REAL = importlib.util.find_spec


def test_a_target_by_name_and_with_conditions() -> None:
    target = Target("onnxruntime", threads=2, batch=3)
    assert isinstance(target, Target) and type(target).__name__ == "ORTTarget" and target.available()
    assert target.conditions == {"target": "onnxruntime", "threads": 2, "batch": 3}
    assert get_target(target) is target and get_target("onnxruntime").conditions["threads"] == 1
    assert repr(target) == "Target('onnxruntime', threads=2, batch=3)"
    assert target.vector_width == (16 if "avx512f" in cpu.flags() else 8) and "int8" in target.formats


@pytest.mark.parametrize(("name", "text"), [("onnxruntme", "did you mean 'onnxruntime'"), ("tpu", "known: onnxruntime, openvino")])
def test_unknown_names(name: str, text: str) -> None:
    with pytest.raises(TargetError, match=text):
        get_target(name)


@pytest.mark.parametrize("bad", [{"threads": 0}, {"batch": -1}, {"batch": 1.5}, {"threads": True}])
def test_conditions_are_checked(bad: dict[str, int]) -> None:
    with pytest.raises(TargetError, match="at least 1"):
        get_target("onnxruntime", **bad)
    with pytest.raises(TargetError, match="a target is a name"):
        get_target(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["executorch", "litert"])
@pytest.mark.parametrize("installed", [False, True])
def test_known_targets_say_what_is_missing(name: str, installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    package = registry.KNOWN[name][1]
    spec = importlib.machinery.ModuleSpec(package, None) if installed else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked, *rest: spec if asked == package else REAL(asked, *rest))
    with pytest.raises(TargetError, match="cannot lower to it yet" if installed else rf"pip install 'shohin\[{name}\]'"):
        get_target(name)
    row = next(row for row in list_targets() if row.name == name)
    assert row.installed == installed and not row.supported


def test_a_target_without_its_extra_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked, *rest: None if asked == "openvino" else REAL(asked, *rest))
    with pytest.raises(TargetError, match=r"pip install 'shohin\[openvino\]'"):
        get_target("openvino")
    row = next(row for row in list_targets() if row.name == "openvino")
    assert row.supported and not row.installed


def test_list_names_versions() -> None:
    row = list_targets()[0]
    assert row.name == "onnxruntime" and row.installed and row.supported and row.version and "int8" in row.accelerates
    json.dumps(registry.to_json(list_targets()))


INFO = (
    "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu sse4_1 avx avx2 {}\n\nprocessor\t: 1\nmodel name\t: Some CPU @ 2 GHz\n"
)


@pytest.mark.parametrize(
    ("words", "found", "saturates"),
    [
        ("", {"sse4.1", "avx", "avx2"}, True),
        ("avx_vnni", {"sse4.1", "avx", "avx2", "avx_vnni"}, False),
        ("avx512f avx512bw", {"sse4.1", "avx", "avx2", "avx512f", "avx512bw"}, True),
        ("avx512f avx512_vnni", {"sse4.1", "avx", "avx2", "avx512f", "avx512_vnni"}, False),
        ("amx_int8", {"sse4.1", "avx", "avx2", "amx_int8"}, False),
    ],
)
def test_x86_flags(words: str, found: set[str], saturates: bool) -> None:
    model, flags = cpu.parse_cpuinfo(INFO.format(words))
    assert model == "Some CPU @ 2 GHz" and flags == found and cpu.saturates_u8s8(flags) == saturates


def test_arm_flags_and_nothing() -> None:
    _, flags = cpu.parse_cpuinfo("processor : 0\nFeatures : fp asimd asimddp i8mm\n")
    assert flags == {"neon", "dotprod", "i8mm"} and not cpu.saturates_u8s8(flags)
    assert cpu.parse_cpuinfo("") == ("", frozenset())


def test_environment_is_json() -> None:
    found = json.loads(json.dumps(cpu.environment(threads=2)))
    assert found["threads"] == 2 and found["onnxruntime"] and found["torch"] and found["cpu"] and found["flags"]
    assert found["saturates_u8s8"] == cpu.saturates_u8s8(cpu.flags())
