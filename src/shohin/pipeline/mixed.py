"""Mixed precision: a format for each layer, planned on the bytes and milliseconds of files, and held against the file that comes of it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import fx

from shohin.budget import Budget
from shohin.candidate import Measurement, Metrics
from shohin.data import Call
from shohin.formats import Scheme, is_bits, is_scheme
from shohin.pipeline.ship import expected_formats, lower_program, lower_quantized
from shohin.planning.formats import FormatSite, Times, choices_to_time, choose, fitted_times, predicted
from shohin.program import Program, fold
from shohin.program.program import shape_of
from shohin.quantization import Quantized, tables, weights_by_address
from shohin.quantization.damage import maker
from shohin.quantization.sensitivity import sensitivity
from shohin.quantization.sites import held_by, table_of
from shohin.targets import Target, Timing

#: random mixtures that are timed for each format, and rounds of planning against what was measured
TIMED, ROUNDS = 4, 4
Make = Callable[..., Quantized]


@dataclass(frozen=True)
class Mixed:
    """What was chosen.

    Args:
        formats: address -> format, where it is not float.
        quantized: the program in these.
        metrics: of its file.
        notes: facts for the report, JSON-able: bounds that are not kept, what was planned and measured, sensitivities.
    """

    formats: dict[str, str]
    quantized: Quantized
    metrics: Metrics
    notes: dict[str, Any]


def mixed(
    program: Program,
    calls: Sequence[Call],
    options: Mapping[str, Mapping[str, str]],
    make: Make,
    plainly: Make,
    target: Target,
    budget: Budget,
    example: Call,
    *,
    measure: str = "fisher",
    seed: int = 0,
) -> Mixed:
    """The formats with the least loss under which the file keeps a budget's bounds on size and latency.

    Each format is tried everywhere; from that come what every layer loses in it, and the tables of planning. The file of what is planned
    is written and measured; where it misses a bound the tables are scaled to it, and it is planned again.

    Args:
        options: name of a format -> address -> what the layer is held in (where it can be).
        make: formats by address -> the program in them.
        plainly: the same, quickly, for what is only compared and timed; takes other ``calls=``, too.
        target, budget, example: where bounds hold, which, and the call that is timed.
        measure: of what layers lose; see `shohin.quantization.sensitivity`.
    """
    losses = sensitivity(program, {text: plainly(dict(chosen)) for text, chosen in options.items()}, calls, measure, seed)
    sites, members = _sites(program, options, losses)
    quick = partial(plainly, calls=calls[:1])  # for files that are only timed
    with tempfile.TemporaryDirectory() as folder:
        files = _Files(Path(folder), program, target, example, members, options)
        plain, _ = files.write("float", {site.name: "float32" for site in sites}, quick)
        times, told = _timed(files, sites, options, quick, seed) if "latency_ms" in budget.limits else (None, {})
        rounds = _planned(files, plain, sites, budget, times, quick)
        best = min(rounds, key=lambda r: (bool(r.missed), len(r.floats), r.worst or r.loss))
        formats = files.formats(best.chosen)
        quantized = make(formats)
        path, floats = files.write("best", best.chosen, lambda _: quantized)
        measured = files.time({"float": plain, "mixed": path})
        values, base = (
            {"size_bytes": float(p.stat().st_size), "latency_ms": measured[n].value} for n, p in (("mixed", path), ("float", plain))
        )
    unmet = budget.violations(values, base)
    notes = {
        "budget": str(budget),
        "met": not unmet,
        "unmet": [f"{metric}: {value:g} measured, {bound:g} allowed" for metric, (value, bound) in unmet.items()],
        "planned": {"rounds": [r.to_json() for r in rounds], **told},
        "measured": {"this": values, "float": base},
        "floats": sorted(floats),
        "sensitivity": {site.name: dict(site.losses) for site in sites},
    }
    size = Measurement(values["size_bytes"], "measured: bytes of the file")
    return Mixed(formats, quantized, Metrics(latency_ms=measured["mixed"].measurement(), size_bytes=size), notes)


@dataclass(frozen=True)
class _Round:
    """One plan and its file.

    Args:
        chosen: site -> format.
        loss, gap: by the tables.
        planned, measured: metric -> value.
        missed: metric -> (measured, bound).
        floats: sites that should compute on integers, and that the runtime computes in floats.
    """

    chosen: dict[str, str]
    loss: float
    gap: float
    planned: dict[str, float]
    measured: dict[str, float]
    missed: dict[str, tuple[float, float]]
    floats: frozenset[str] = frozenset()

    @property
    def worst(self) -> float:
        """The largest share of a bound that is needed, where one is missed; else 0."""
        return max((value / bound for value, bound in self.missed.values()), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """For the notes."""
        return {
            "formats": self.chosen,
            "loss": self.loss,
            "gap": self.gap,
            "planned": self.planned,
            "measured": self.measured,
            "missed": sorted(self.missed),
        }


def _planned(files: _Files, plain: Path, sites: Sequence[FormatSite], budget: Budget, times: Times | None, quick: Make) -> list[_Round]:
    """Plans, and files of them, until one keeps the bounds; tables are set right by each file.

    A layer that a file says is to compute on integers, and that the runtime computes in floats, is not planned so again.
    """
    found: list[_Round] = []
    fixed, scale = plain.stat().st_size - sum(site.sizes["float32"] for site in sites), 1.0
    base = {"size_bytes": float(plain.stat().st_size)}
    if times is not None:
        base["latency_ms"] = files.time({"float": plain})["float"].value
    for number in range(ROUNDS):
        bounds = {metric: limit.absolute(base[metric]) for metric, limit in budget.limits.items()}
        asked = {metric: bound / scale if metric == "latency_ms" else bound for metric, bound in bounds.items()}
        chosen, solution = choose(sites, asked, fixed, times)
        path, floats = files.write(f"round{number}", chosen, quick)
        values, planned = {"size_bytes": float(path.stat().st_size)}, {"size_bytes": solution.totals["size_bytes"]}
        if times is not None:
            measured = files.time({"float": plain, "mixed": path})
            base["latency_ms"], values["latency_ms"] = measured["float"].value, measured["mixed"].value
            planned["latency_ms"] = predicted(sites, chosen, times)
        missed = budget.violations(values, base)
        found.append(_Round(chosen, solution.objective, solution.gap, planned, values, missed, floats))
        if not floats and (not missed or not solution.feasible):
            break
        sites = [site.without_integers() if site.name in floats else site for site in sites]
        fixed += max(0.0, values["size_bytes"] - planned["size_bytes"])  # names and conversions, which the tables do not know
        if "latency_ms" in missed:
            scale *= 1.005 * missed["latency_ms"][0] / missed["latency_ms"][1]
    return found


@dataclass(frozen=True)
class _Files:
    """Files of choices in a folder."""

    folder: Path
    program: Program
    target: Target
    example: Call
    members: Mapping[str, tuple[str, ...]]
    options: Mapping[str, Mapping[str, str]]

    def formats(self, chosen: Mapping[str, str]) -> dict[str, str]:
        """Address -> what it is held in, of what is not float."""
        held = {}
        for site, form in chosen.items():
            if form != "float32":
                held.update({address: self.options[form][address] for address in self.members[site]})
        return held

    def write(self, name: str, chosen: Mapping[str, str], make: Make) -> tuple[Path, frozenset[str]]:
        """The file of a choice, and the sites that the runtime computes in floats though their codes are integers."""
        path, formats = self.folder / f"{name}.onnx", self.formats(chosen)
        if not formats:
            lower_program(self.target, self.program, path, self.example.args, self.example.kwargs)
            return path, frozenset()
        quantized = make(formats)
        lower_quantized(self.target, quantized, path, self.example.args, self.example.kwargs)
        departs = self.target.check(path, expected_formats(self.program, quantized))
        wrong = {text.split(":")[0] for text in departs if ": should be int8" in text}
        homes = {weight: address for address, weight in quantized.sites.layers.items()}
        places = {homes[weight] for weight in wrong & homes.keys()}
        return path, frozenset(site for site, addresses in self.members.items() if places & set(addresses))

    def time(self, files: Mapping[str, Path]) -> dict[str, Timing]:
        """In one interleaving."""
        return self.target.measure(files, self.example.args, kwargs=self.example.kwargs)


def _timed(
    files: _Files, sites: Sequence[FormatSite], options: Mapping[str, Mapping[str, str]], quick: Make, seed: int
) -> tuple[Times, dict[str, Any]]:
    """Milliseconds by format, from mixtures, and how well the fit foretells each of them."""
    choices = choices_to_time(sites, options, TIMED * len(options), seed)
    paths = {str(i): files.write(f"timed{i}", chosen, quick)[0] for i, chosen in enumerate(choices)}
    found = files.time(paths)
    milliseconds = [found[str(i)].value for i in range(len(choices))]
    times = fitted_times(sites, choices, milliseconds)
    errors = [abs(predicted(sites, chosen, times) / ms - 1) for chosen, ms in zip(choices, milliseconds, strict=True)]
    return times, {"timed": len(choices), "mean_error": sum(errors) / len(errors)}


def _sites(
    program: Program, options: Mapping[str, Mapping[str, str]], losses: Mapping[str, Mapping[str, float]]
) -> tuple[list[FormatSite], dict[str, tuple[str, ...]]]:
    """What is chosen for, and the addresses of each."""
    plain = fold(program).program
    weights, looked = weights_by_address(plain), tables(plain)
    by_name: dict[str, list[fx.Node]] = {}
    for node in plain.graph.nodes:
        name = held_by(plain, node)
        if name is not None and any(plain.origins[node.name].address in chosen for chosen in options.values()):
            by_name.setdefault(name, []).append(node)
    address = {node.name: plain.origins[node.name].address for nodes in by_name.values() for node in nodes}
    home = {address[node.name]: address[nodes[0].name] for nodes in by_name.values() for node in nodes}
    found = []
    for name, nodes in by_name.items():
        places = [address[node.name] for node in nodes]
        able = [text for text, chosen in options.items() if all(place in chosen and text in losses.get(place, {}) for place in places)]
        shape = tuple(plain.tensors[name].shape)
        numbers = math.prod(shape)
        kind = "table" if places[0] in looked else weights[places[0]].kind if places[0] in weights else "linear"
        macs = 0.0 if kind == "table" else sum(math.prod(shape_of(node)) for node in nodes) / plain.batch * numbers / shape[0]
        read: Any = nodes[0].args[0]
        elements = 0.0 if kind == "table" else math.prod(shape_of(read)) / plain.batch
        source = None if kind == "table" else maker(plain, nodes[0])
        looked_at = kind != "table" and any(table_of(plain, node) == name for node in plain.graph.nodes)
        beside = 4 * numbers if looked_at else 0  # an embedding that shares the weight goes on with floats
        sizes = {text: float(_bytes(options[text][places[0]], shape[0], numbers) + beside) for text in able} | {"float32": 4.0 * numbers}
        lost = {text: sum(losses[place][text] for place in places) for text in able} | {"float32": 0.0}
        integer = frozenset(text for text in able if is_bits(options[text][places[0]]))
        found.append(FormatSite(places[0], kind, lost, sizes, macs, elements, home.get(source or ""), integer))
    return found, {home_: tuple(a for a, b in home.items() if b == home_) for home_ in dict.fromkeys(home.values())}


def _bytes(text: str, outputs: int, numbers: int) -> int:
    """Bytes of a weight and its grid in a file."""
    if is_scheme(text):
        return Scheme.parse(text).size(outputs, numbers // outputs)
    return numbers + 5 * outputs  # codes in 8 bits whatever they are, float32 scales, 8-bit zero points
