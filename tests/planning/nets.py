"""Small networks as lists of operators, with a known latency, for the planning tests."""

from __future__ import annotations

import numpy as np

from shohin.graph.costs import Edge, Extent, Operator, Term
from shohin.planning.choice import Choice
from shohin.planning.features import Features
from shohin.planning.latency import LatencyModel, random_choices
from shohin.planning.loss import group_options
from shohin.planning.options import GroupOptions, RegionOption, aligned_counts
from shohin.planning.resources import Costs


def width(group: str) -> Extent:
    return Extent(0, {group: 1})


def conv(address: str, source: Extent, target: Extent, area: int, taps: int = 1, regions: tuple[str, ...] = ()) -> Operator:
    return Operator(
        address,
        f"conv{taps}",
        (Term(taps * area, (source, target)),),
        (Term(area, (source,)), Term(area, (target,))),
        (Term(taps, (source, target)), Term(1, (target,))),
        regions,
        address,
    )


def add(address: str, stream: Extent, area: int, regions: tuple[str, ...] = ()) -> Operator:
    return Operator(address, "add", (), (Term(3 * area, (stream,)),), (), regions, address)


def chain(depth: int, size: int, seed: int, most: int | None = None) -> tuple[list[Operator], list[GroupOptions]]:
    """Convolutions in a row: operator i depends on groups i-1 and i."""
    random = np.random.default_rng(seed)
    area, ops, previous = 64, [], Extent(3, {})
    for i in range(depth):
        ops.append(conv(f"c{i}", previous, width(f"g{i}"), area, taps=9 if i % 2 else 1))
        previous, area = width(f"g{i}"), max(area // 2, 4)
    ops.append(conv("head", previous, Extent(10, {}), 1))
    return ops, [losses(f"g{i}", size, random, most) for i in range(depth)]


def residual(stages: int, blocks: int, size: int, seed: int, most: int | None = None, skip_loss: float = 0.2, nested: bool = False):
    """Streams with bottleneck blocks that may be skipped; with ``nested`` the first two blocks of a stage also go together."""
    random = np.random.default_rng(seed)
    ops, options, regions = [], [], []
    previous, area = Extent(3, {}), 64
    for s in range(stages):
        stream = width(f"s{s}")
        options.append(losses(f"s{s}", size, random, most))
        ops.append(conv(f"stem{s}", previous, stream, area, taps=9))
        for b in range(blocks):
            hidden, region = width(f"h{s}{b}"), f"r{s}{b}"
            inside = (region, f"r{s}01") if nested and b < 2 else (region,)
            options.append(losses(f"h{s}{b}", size, random, most))
            ops += [
                conv(f"{region}.a", stream, hidden, area, regions=inside),
                conv(f"{region}.b", hidden, stream, area, taps=9, regions=inside),
                add(f"{region}.add", stream, area, regions=inside),
            ]
            regions.append(RegionOption(region, float(random.gamma(1, skip_loss))))
        if nested:
            regions.append(RegionOption(f"r{s}01", float(random.gamma(2, skip_loss))))
        previous, area = stream, max(area // 4, 4)
    ops.append(conv("head", previous, Extent(10, {}), 1))
    return ops, options, regions


def losses(name: str, size: int, random: np.random.Generator, most: int | None) -> GroupOptions:
    return group_options(name, random.gamma(0.7, random.gamma(1.0, 0.02) + 0.002, size=size), aligned_counts(size, 8, 0.1, most))


def truth(features: Features, seed: int) -> np.ndarray:
    """Known coefficients, in milliseconds per feature."""
    random = np.random.default_rng(seed)
    unit = [0.004 if "macs" in n else 0.05 if "fixed" in n else 0.01 for n in features.names]
    return random.uniform(0.5, 1.5, len(unit)) * unit


def fitted(ops, options, regions=(), *, seed=0, noise=0.0, n=24, int8=frozenset(), edges: list[Edge] | None = None) -> Costs:
    features = Features(ops, edges or ())
    sets = [frozenset(), int8] if int8 else [frozenset()]
    choices = random_choices({g.name: g for g in options}, n, seed, regions=[r.name for r in regions], precisions=sets)
    times = features.matrix(choices) @ truth(features, seed)
    times = times * (1 + noise * np.random.default_rng(seed).standard_normal(len(times)))
    return Costs(LatencyModel.fit(features, choices, times))


def whole(options) -> Choice:
    return Choice({g.name: g.size for g in options})
