"""Patterns of zeros: their strings, what they select and what they recognize."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shohin.errors import PlanError
from shohin.pruning.sparse import Pattern

TEXTS = ["unstructured 0.5", "unstructured 0.0", "2:4", "4:8", "1:3", "block 1x8 0.5", "block 4x1 0.25", "block 2x2 0.75"]
SHAPES = [(8, 24), (8, 24, 1, 1), (8, 24, 3), (16, 48, 3, 3), (4, 24, 2, 1, 2)]


def scores(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("text", TEXTS)
def test_string_round_trip(text: str) -> None:
    assert str(Pattern.parse(text)) == text
    assert Pattern.parse(Pattern.parse(text)) == Pattern.parse(text)


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 64), st.integers(1, 64))
def test_every_number_survives_its_string(zeros: float, a: int, b: int) -> None:
    patterns = [Pattern.unstructured(zeros), Pattern.block(a, b, zeros)] + ([Pattern.n_m(a, b)] if a < b else [])
    assert [Pattern.parse(str(p)) for p in patterns] == patterns


@pytest.mark.parametrize(
    "text", ["", "4:2", "4:4", "0:4", "2:0", "2-4", "unstructured", "unstructured 1", "unstructured -0.1", "unstructured nan", "block 0.5", "block 0x4 0.5", "block 1x4", "N:M", "dense"]
)  # fmt: skip
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(PlanError):
        Pattern.parse(text)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", TEXTS)
def test_what_is_selected_has_the_pattern_and_its_count(text: str, shape: tuple[int, ...]) -> None:
    pattern = Pattern.parse(text)
    for seed in range(3):
        mask = pattern.select(scores(shape, seed))
        assert mask.dtype == torch.bool and mask.shape == shape
        assert pattern.holds(scores(shape, seed + 10).add(1) * mask)
        assert int((~mask).sum()) == pytest.approx(pattern.zeros * mask.numel(), abs=pattern.height * pattern.width / 2)
        if pattern.zeros:
            assert not pattern.holds(torch.ones(shape))
            one_more = mask.clone().flatten()
            one_more[(~mask).flatten().nonzero()[0]] = True
            assert (
                not pattern.holds(one_more.reshape(shape).float())
                or pattern.height * pattern.width > 1
                or round(pattern.zeros * mask.numel()) < 1
            )


def test_the_largest_stay() -> None:
    s = scores((8, 24), 3)
    mask = Pattern.unstructured(0.3).select(s)
    assert s[mask].min() > s[~mask].max()
    groups = Pattern.parse("2:4").select(s).unflatten(1, (-1, 4))
    by_group = s.unflatten(1, (-1, 4))
    assert bool((by_group.masked_fill(~groups, 9).amin(-1) > by_group.masked_fill(groups, -1).amax(-1)).all())


def test_n_of_m_of_a_convolution_runs_along_channels_at_each_kernel_position() -> None:
    s = scores((4, 8, 3, 3), 1)
    mask = Pattern.parse("2:4").select(s)
    for y in range(3):
        for x in range(3):
            assert torch.equal(mask[:, :, y, x], Pattern.parse("2:4").select(s[:, :, y, x]))
    wrong = torch.ones(4, 8, 2, 2).flatten(1)
    wrong[:, ::2] = 0  # 2 of 4 in memory order, but whole kernel positions
    assert not Pattern.parse("2:4").holds(wrong.reshape(4, 8, 2, 2))


def test_blocks_go_whole() -> None:
    mask = Pattern.parse("block 2x4 0.5").select(scores((6, 8), 2)).unflatten(1, (2, 4)).unflatten(0, (3, 2))
    filled = mask.float().mean((1, 3))
    assert set(filled.flatten().tolist()) == {0.0, 1.0} and float(filled.mean()) == 0.5
    scattered = torch.ones(4, 8)
    scattered[:, ::2] = 0
    assert not Pattern.parse("block 1x4 0.5").holds(scattered)


@pytest.mark.parametrize("zeros", [0.1, 0.37, 0.5, 0.9])
def test_per_row_keeps_equal_numbers_and_the_exact_total(zeros: float) -> None:
    pattern = Pattern.unstructured(zeros)
    mask = pattern.select(scores((7, 15), 5) * torch.arange(1, 8)[:, None], per_row=True)
    kept = mask.sum(1)
    assert int(kept.max() - kept.min()) <= 1 and int((~mask).sum()) == pattern.dropped(105)


def test_equal_scores_give_exact_counts_and_something_always_stays() -> None:
    assert int(Pattern.unstructured(0.5).select(torch.ones(4, 5)).sum()) == 10
    assert int(Pattern.unstructured(0.999).select(torch.ones(2, 2)).sum()) == 1
    assert int(Pattern.parse("block 4x1 0.99").select(torch.ones(4, 5)).sum()) == 4


@pytest.mark.parametrize(("text", "shape"), [("2:4", (4, 6)), ("2:4", (4, 3, 2, 2)), ("block 1x8 0.5", (4, 12)), ("block 4x1 0.5", (6, 8))])
def test_what_does_not_divide_is_refused(text: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="not divisible"):
        Pattern.parse(text).select(torch.ones(shape))
    assert not Pattern.parse(text).holds(torch.zeros(shape))


def test_nan_scores_are_refused() -> None:
    with pytest.raises(PlanError, match="NaN"):
        Pattern.unstructured(0.5).select(torch.tensor([[1.0, float("nan")]]))
