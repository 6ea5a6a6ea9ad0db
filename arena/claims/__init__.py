"""The claims ledger: published findings as experiment files with a verdict rule, run, judged and recorded.

A claim is a file of ``experiments/claims``: an experiment for ``arena tune`` and a ``[claim]`` table with the
sentence, the published numbers and the rule that decides. Walked as data: file -> :class:`Claim` -> the tuner
-> result rows -> :func:`score_table` -> :func:`judge` -> lines of ``arena reproduce`` and of docs/claims.md.
"""

from arena.claims.file import SIZES, Claim, claim_names, load_claim
from arena.claims.judge import Judged, judge
from arena.claims.record import Record, load_record, make_record
from arena.claims.scores import score_table

__all__ = [
    "SIZES",
    "Claim",
    "Judged",
    "Record",
    "claim_names",
    "judge",
    "load_claim",
    "load_record",
    "make_record",
    "score_table",
]
