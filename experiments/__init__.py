"""Experiment files, one per published claim or study, and their recorded results. Data: no code."""
