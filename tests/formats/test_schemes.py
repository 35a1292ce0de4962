"""Weight schemes: text, quantizers of groups, bytes."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shohin.errors import PlanError
from shohin.formats import FORMATS, Quantizer, Scheme, is_scheme

FEW = [name for name, form in FORMATS.items() if form.bits <= 8]


@given(st.sampled_from(FEW), st.sampled_from(["tensor", "channel", "group"]), st.integers(1, 512))
def test_text_and_value_are_the_same(name: str, granularity: str, group: int) -> None:
    text = f"weights {name} {granularity}" + (f" {group}" if granularity == "group" else "")
    scheme = Scheme.parse(text)
    assert str(scheme) == text and Scheme.parse(str(scheme)) == scheme and is_scheme(text) and hash(scheme) == hash(Scheme.parse(text))


@pytest.mark.parametrize("name", FEW)
def test_formats_have_all_their_codes(name: str) -> None:
    form = FORMATS[name]
    narrow = name in ("int7", "int8")
    assert form.high - form.low + 1 == 2**form.bits - narrow and form.low <= 0 <= form.high
    assert form.symmetric == name.startswith("int") and form.bits == int(name.removeprefix("u").removeprefix("int"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("int4", "no weight format"),
        ("weights", "no weight format"),
        ("weights int4 group", "no weight format"),
        ("weights int4 group 0", "no weight format"),
        ("weights int4 group -3", "no weight format"),
        ("weights int4 groups 32", "no weight format"),
        ("weights int9", "unknown format 'int9'"),
        ("weights int32", "at most 8 bits"),
    ],
)
def test_other_texts_are_refused(text: str, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        Scheme.parse(text)


@pytest.mark.parametrize("shape", [(3, 10), (4, 2, 3, 3), (2, 7)])
@pytest.mark.parametrize("group", [1, 4, 7, 32])
def test_groups_have_their_own_scales(shape: tuple[int, ...], group: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(group))
    flat = x.flatten(1)
    parts = -(-flat.shape[1] // group)
    scale = torch.linspace(0.01, 0.3, len(x) * parts, dtype=torch.float64).reshape(len(x), parts)
    zero = torch.arange(len(x) * parts).reshape(len(x), parts) % 16
    q = Quantizer(FORMATS["uint4"], scale, zero, 0, group)
    for row in range(len(x)):
        for part in range(parts):
            one = Quantizer(FORMATS["uint4"], scale[row, part], zero[row, part])
            own = slice(part * group, (part + 1) * group)
            assert torch.equal(q.codes(x).flatten(1)[row, own], one.codes(flat[row, own]))
            assert torch.equal(q.fake(x).flatten(1)[row, own], one.fake(flat[row, own]))
    torch.testing.assert_close(q.decoded(q.codes(x)), q.fake(x), rtol=0, atol=1e-6)
    again = Quantizer.from_json(json.loads(json.dumps(q.to_json())))
    assert again.to_json() == q.to_json() and torch.equal(again.codes(x), q.codes(x))
    assert Scheme.of(again) == Scheme.parse(f"weights uint4 group {group}")


def test_bytes_count_codes_scales_and_zero_points() -> None:
    assert Scheme.parse("weights int8 tensor").size(4, 10) == 40 + 4
    assert Scheme.parse("weights int4 channel").size(4, 10) == 20 + 16
    assert Scheme.parse("weights uint4 group 4").size(4, 10) == 20 + 4 * 12 + 6
