"""A claim's verdict as a section of its folder's report."""

from __future__ import annotations

from pathlib import Path

from arena.claims.file import SIZES, claim_names, load_claim
from arena.claims.judge import judge
from arena.claims.page import COLUMNS, RULE, rows_of
from arena.claims.scores import score_table
from arena.grid.results import load_results
from arena.report.document import Section
from arena.report.request import read_request

_CAPTION = (
    "Scores are chance-scaled accuracies, (accuracy - chance) / (1 - chance), on test at the length named. "
    "(The verdicts of declared pairs on this page are of accuracies at the longest length, in a family of "
    "their own.) "
)


def claim_sections(directory: str | Path) -> list[Section]:
    """The verdict on the claim that a folder of ``arena reproduce`` was trained for.

    Empty where the folder's request is not what the claim's file says now: other settings ask something
    else.
    """
    request = read_request(Path(directory))
    name = str(request.get("name"))
    if name not in claim_names():
        return []
    claim = load_claim(name)
    for size in SIZES:
        if claim.experiments[size].model_dump(mode="json", exclude_none=True) == request:
            judged = judge(claim, size, score_table(load_results(directory)))
            about = claim.section
            return [
                Section(
                    heading=f"Claim {about.number} at size {size}: {judged.verdict}",
                    columns=list(COLUMNS),
                    rows=[list(row) for row in rows_of(judged)],
                    text=True,
                    lines=[
                        f"Source: {about.source}",
                        f"How its numbers are known: {about.trust}",
                        f"What differs from it here: {about.settings}",
                    ],
                    caption=_CAPTION + " ".join(RULE.replace("*", "").split()),
                    commands=[f"arena reproduce {name}" + f" --size {size}" * (size != "cpu")],
                )
            ]
    return []
