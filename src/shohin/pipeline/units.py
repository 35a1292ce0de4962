"""Which units and blocks stay: scores, tables, a choice, the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shohin.errors import PlanError
from shohin.evidence import Divergence
from shohin.graph import Graph
from shohin.plan import Plan
from shohin.planning.choice import Choice
from shohin.planning.loss import correct, loss_table
from shohin.planning.options import GroupOptions, RegionOption
from shohin.planning.widths import group_counts, plan_of
from shohin.pruning import allocation
from shohin.pruning.sensitivity import of_groups, of_regions
from shohin.surgery import rewrite, view

#: "planned": the least loss by tables; "sensitivity": by tables scaled to what cutting each group alone really does; "uniform": the
#: same share everywhere; "global": one threshold for all units
ALLOCATIONS = ("planned", "sensitivity", "uniform", "global")
#: models with at most this many blocks are looked at anew after each block that goes
LOOKED_AT_ANEW = 16
#: times that a share of the parameters is asked for: tables count what operations read, where a shared weight counts twice
ROUNDS = 20


@dataclass(frozen=True)
class Share:
    """What is asked.

    Args:
        keep: share in (0, 1].
        of: "macs" or "params".
    """

    keep: float
    of: str


def choose_units(
    graph: Graph,
    scores: Mapping[str, Sequence[float]],
    share: Share,
    align: int,
    how: str = "planned",
    *,
    classes: Mapping[str, object] | None = None,
    divergence: Divergence | None = None,
    blocks: bool = False,
) -> Choice:
    """How many units of each group stay, and with ``blocks`` which regions are skipped.

    Args:
        scores: group -> one for each unit; estimated losses, for "planned" and "sensitivity".
        align: kept channels are multiples of this.
        how: one of `ALLOCATIONS`.
        classes: for "global": see `shohin.pruning.allocation.ranked`.
        divergence: for "sensitivity" and blocks.

    Raises:
        PlanError: if the share cannot be reached; it names the least that can.
    """
    options = group_counts(graph, align)
    regions: list[RegionOption] = []
    if how in ("planned", "sensitivity"):
        options, regions = _tables(graph, options, scores, how, divergence, blocks)

    def chosen(keep: float) -> Choice:
        if how == "uniform":
            return allocation.uniform(graph, options, keep, share.of)
        if how == "global":
            return allocation.ranked(graph, options, scores, keep, share.of, classes)
        return allocation.least_loss(graph, options, regions, keep, share.of)

    least = Choice({n: g.counts[0] for n, g in options.items()}, frozenset(r.name for r in regions))
    asked, why = share.keep, ""
    for _ in range(ROUNDS):
        try:
            choice = chosen(asked)
        except PlanError as error:
            why = str(error) if asked == share.keep else ""
            break
        left = share_left(graph, plan_of(graph, choice), share.of)
        if left <= share.keep + 1e-12:
            return choice
        asked *= 0.999 * share.keep / left
    left = share_left(graph, plan_of(graph, least), share.of)
    if left <= share.keep:
        return least
    steps = f" with widths in multiples of {align} (align=)" if align > 1 else ""
    raise PlanError(f"{why or f'keep={share.keep} of {share.of} cannot be reached'}; the least that can be left{steps} is keep={left:.2g}")


def _tables(
    graph: Graph,
    options: Mapping[str, GroupOptions],
    scores: Mapping[str, Sequence[float]],
    how: str,
    divergence: Divergence | None,
    blocks: bool,
) -> tuple[dict[str, GroupOptions], list[RegionOption]]:
    """What each count of each group loses, and what each region does."""
    tables = {n: GroupOptions(n, g.size, g.counts, loss_table(scores[n], g.counts)) for n, g in options.items()}
    regions: list[RegionOption] = []
    if divergence is not None and (how == "sensitivity" or blocks):
        tables = correct(tables, {(name, count): loss for name, count, loss in of_groups(graph, options, scores, divergence)})
        if blocks:
            regions = [RegionOption(n, loss) for n, loss in of_regions(graph, [r.name for r in graph.regions if r.residual], divergence)]
    return tables, regions


def choose_blocks(graph: Graph, share: Share, loss: Mapping[str, float], divergence: Divergence | None) -> tuple[str, ...]:
    """Names of the regions and layers to skip: the cheapest by ``loss`` until the share is reached.

    Args:
        loss: block -> loss when it alone is skipped.
        divergence: where there are few blocks, each is looked at anew beside those that are gone already; None: never.

    Raises:
        PlanError: if skipping every block is not enough.
    """
    gone: tuple[str, ...] = ()
    left = dict(loss)
    while share_left(graph, Plan(graph.program.fingerprint, {}, gone), share.of) > share.keep:
        nodes = {n for name in gone for n in graph.region(name).nodes}
        left = {n: value for n, value in left.items() if not graph.region(n).nodes & nodes}
        if not left:
            least = share_left(graph, Plan(graph.program.fingerprint, {}, gone), share.of)
            listed = ", ".join(gone[:4]) or "none can be skipped"
            raise PlanError(
                f"keep={share.keep} of {share.of} cannot be reached by skipping blocks ({listed}): the least that can be left is "
                f"keep={least:.2g}; add another granularity, such as ('channel', 'depth')"
            )
        if gone and divergence is not None and len(left) <= LOOKED_AT_ANEW:
            plans = {n: Plan(graph.program.fingerprint, {}, (*gone, n)) for n in left}
            left = {n: divergence(view(graph, plan)) for n, plan in plans.items()}
        gone = (*gone, min(left, key=lambda n: (left[n], n)))
    return gone


def share_left(graph: Graph, plan: Plan, of: str) -> float:
    """What a plan leaves of the model's "macs" or "params"."""
    if of == "macs":
        whole = graph.macs()
        return graph.macs(plan) / whole if whole else 1.0
    if plan.is_identity:
        return 1.0
    rewritten, names, trained = rewrite(graph, plan), graph.program.names, graph.program.trainable
    used = {names[n.name] for n in rewritten.graph.nodes if n.op == "placeholder" and n.name in names}
    read = {names[n.name] for n in graph.program.graph.nodes if n.op == "placeholder" and n.name in names and n.users}
    tensors = {name: t for name, t in graph.program.tensors.items() if name in trained}
    sizes = {id(t): t.numel() for t in tensors.values()}
    known = {id(tensors[name]) for name in read & tensors.keys()}
    parts = {key: size for key, size in sizes.items() if key not in known}  # what nothing reads stays as it is
    parts |= {id(tensors[name]): t.numel() for name, t in rewritten.sliced().items() if name in used and name in tensors}
    return sum(parts.values()) / max(sum(sizes.values()), 1)
