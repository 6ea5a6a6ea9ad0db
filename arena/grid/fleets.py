"""Who trains with whom."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from arena.grid.plan import Fleet, Run


def plan_fleets(runs: Sequence[Run], fleet_size: int, recorded: Iterable[Sequence[str]] = ()) -> list[Fleet]:
    """Who trains with whom: a function of the runs and of the fleets that the store has recorded.

    Recorded fleets (finished ones, and the halves of one that did not fit into memory) stay as they were; the
    other runs of a group are cut into pieces of ``fleet_size`` in their order. As finished fleets are such
    pieces, the answer is the same whenever it is asked, whatever is missing. Where only one half of a
    recorded fleet is recorded, as a kill leaves it, what remains is the other half. Largest fleets first, so
    that workers end together.

    Args:
        runs: of one experiment or of several.
        fleet_size: most runs in a fleet.
        recorded: ids of the members of each recorded fleet.
    """
    groups: dict[str, dict[str, Run]] = {}
    group_of: dict[str, str] = {}
    for run in runs:
        groups.setdefault(run.group, {})[run.id] = run
        group_of[run.id] = run.group
    fleets: list[Fleet] = []
    taken: set[str] = set()
    # smallest first: where a fleet and its halves are both recorded, the halves are what fits
    for members in sorted(recorded, key=lambda m: (len(m), list(m))):
        group = groups.get(group_of.get(members[0], ""), {}) if members else {}
        rest = [run_id for run_id in members if run_id in group]
        if rest and all(run_id in group or run_id in taken for run_id in members):
            taken.update(rest)
            fleets.append(Fleet(runs=tuple(group.pop(run_id) for run_id in rest)))
    for group in groups.values():
        others = list(group.values())
        fleets += [
            Fleet(runs=tuple(others[start : start + fleet_size]))
            for start in range(0, len(others), fleet_size)
        ]
    order = {run.id: index for index, run in enumerate(runs)}
    return sorted(fleets, key=lambda fleet: (-fleet.planned_tokens, order[fleet.runs[0].id]))


def split_fleet(fleet: Fleet, fits: int | None = None) -> tuple[list[Fleet], list[Fleet]]:
    """What becomes of a fleet that does not fit into memory: its halves, their halves, until they fit.

    So a fleet is always a piece of ``fleet_size`` runs, or a half, or a quarter, ... of one, whatever the
    machine: where memory differs, only how often it is halved does.

    Args:
        fleet: two runs at least.
        fits: the number of runs that fit, where it was measured; None: halved once.

    Returns:
        The pieces to be trained, and those on the way to them, larger ones first.
    """
    middle = (len(fleet.runs) + 1) // 2
    pieces, passed = [], []
    for runs in (fleet.runs[:middle], fleet.runs[middle:]):
        half = Fleet(runs=runs)
        if fits is not None and len(runs) > max(1, fits):
            passed.append(half)
            below = split_fleet(half, fits)
            pieces += below[0]
            passed += below[1]
        else:
            pieces.append(half)
    return pieces, sorted(passed, key=lambda piece: -len(piece.runs))
