"""Operators of other people's packages as backends, used where they are installed and never by default.

Each module says what its package covers: ``refusal`` gives the reason, in half a sentence, why inputs are not
taken (a gate setting, a dtype, a known fault of the package on this machine), or None. No package is a
dependency.
"""
