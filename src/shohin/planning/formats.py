"""Which format each layer gets: tables of what it loses, weighs and takes, and the exact choice under bounds on the whole.

Time is a sum over layers of what their kind takes in each format, by multiplication, and over places where floats and codes meet, by
element; its coefficients are fitted to timings of whole files (non-negative), since timings of single layers mislead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from shohin.planning.latency import fit_nonnegative
from shohin.planning.options import GroupOptions
from shohin.planning.solve import JointTable, Problem, Solution, solve

Floats = npt.NDArray[np.float64]
Chosen = Mapping[str, str]
"""Site -> its format."""

RIDGE = 1e-3


@dataclass(frozen=True)
class FormatSite:
    """A layer, or layers that share a weight, or an embedding.

    Args:
        name: its address; of several, the first.
        kind: "linear", "convolution", "depthwise" or "table".
        losses: format -> what it loses; "float32" is among them, with 0.
        sizes: format -> bytes that its weights take.
        macs: multiplications for one sample.
        elements: numbers of its input for one sample.
        source: the site whose codes it reads if both compute on integers, or None.
        integer: the formats in which it does.
    """

    name: str
    kind: str
    losses: Mapping[str, float]
    sizes: Mapping[str, float]
    macs: float
    elements: float
    source: str | None
    integer: frozenset[str]

    @property
    def formats(self) -> list[str]:
        """What it may be, in a fixed order."""
        return sorted(self.losses)

    def without_integers(self) -> FormatSite:
        """The site that no longer may compute on integers."""
        return replace(self, losses={form: loss for form, loss in self.losses.items() if form not in self.integer})


@dataclass(frozen=True, eq=False)
class Times:
    """Milliseconds: features times non-negative coefficients. See `fitted_times`."""

    names: tuple[str, ...]
    coefficients: Floats

    def rate(self, name: str) -> float:
        """Milliseconds for one of a feature; of one that was never timed NaN."""
        return float(self.coefficients[self.names.index(name)]) if name in self.names else float("nan")


def features(sites: Sequence[FormatSite], chosen: Chosen) -> dict[str, float]:
    """Feature -> amount in a choice: multiplications by kind and format, and elements that change between floats and codes."""
    out = {"fixed": 1.0, "boundary": 0.0}
    known = {site.name: site for site in sites}
    for site in sites:
        form = chosen[site.name]
        if site.kind != "table":
            key = f"{site.kind}, {form}"
            out[key] = out.get(key, 0.0) + site.macs
        source = known.get(site.source or "")
        made = source is not None and chosen[source.name] in source.integer
        out["boundary"] += site.elements * ((form in site.integer) != made if source is not None else form in site.integer)
    return out


def fitted_times(sites: Sequence[FormatSite], choices: Sequence[Chosen], milliseconds: Sequence[float]) -> Times:
    """The fit to timings of whole files."""
    rows = [features(sites, chosen) for chosen in choices]
    names = tuple(sorted({name for row in rows for name in row}))
    table = np.array([[row.get(name, 0.0) for name in names] for row in rows])
    return Times(names, fit_nonnegative(table, np.asarray(milliseconds, dtype=np.float64), RIDGE))


def predicted(sites: Sequence[FormatSite], chosen: Chosen, times: Times) -> float:
    """Milliseconds of a choice."""
    return sum(times.rate(name) * amount for name, amount in features(sites, chosen).items() if amount)


def choices_to_time(sites: Sequence[FormatSite], formats: Iterable[str], count: int, seed: int) -> list[dict[str, str]]:
    """Float everywhere, each format wherever it can be, and so many random mixtures, of which some lie in one piece and some do not."""
    random = np.random.default_rng(seed)
    wanted = list(formats)
    out = [{site.name: "float32" for site in sites}]
    out += [{site.name: form if form in site.losses else "float32" for site in sites} for form in wanted]
    for number in range(count):
        chosen, form = {}, "float32"
        for site in sites:
            if number % 2 or random.uniform() < 0.3:
                form = str(random.choice(["float32", *wanted]))
            chosen[site.name] = form if form in site.losses else "float32"
        out.append(chosen)
    return [dict(items) for items in dict.fromkeys(tuple(sorted(c.items())) for c in out)]


def choose(
    sites: Sequence[FormatSite], bounds: Mapping[str, float], fixed_bytes: float = 0.0, times: Times | None = None
) -> tuple[dict[str, str], Solution]:
    """The formats with the least total loss within bounds on "size_bytes" and "latency_ms", exactly by these tables.

    Args:
        fixed_bytes: of the file beside the weights of the sites.
        times: needed where latency is bounded.

    Raises:
        PlanError: as `shohin.planning.solve.solve` does.
    """
    groups = [
        GroupOptions(s.name, len(s.losses), tuple(range(1, len(s.losses) + 1)), np.array([s.losses[f] for f in s.formats])) for s in sites
    ]
    costs: dict[str, dict[str, Floats]] = {"size_bytes": {s.name: np.array([float(s.sizes[f]) for f in s.formats]) for s in sites}}
    fixed, joint = {"size_bytes": fixed_bytes}, list[JointTable]()
    if times is not None:
        known, edge = {site.name: site for site in sites}, times.rate("boundary")
        fixed["latency_ms"] = times.rate("fixed")
        costs["latency_ms"] = {}
        for site in sites:
            codes = np.array([form in site.integer for form in site.formats])
            own = np.array([0.0 if site.kind == "table" else times.rate(f"{site.kind}, {form}") * site.macs for form in site.formats])
            source = known.get(site.source or "")
            if source is None:
                own = own + codes * site.elements * edge
            else:
                made = np.array([form in source.integer for form in source.formats])
                joint.append(JointTable((source.name, site.name), {"latency_ms": (made[:, None] != codes) * site.elements * edge}))
            costs["latency_ms"][site.name] = own
    solution = solve(Problem(groups, costs, bounds, fixed=fixed, joint=joint))
    return {site.name: site.formats[solution.kept[site.name] - 1] for site in sites}, solution
