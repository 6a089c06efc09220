"""One process a measurement: ``python -m benchmarks.contestants.NAME TASK.json`` writes ``result.json`` beside it.

Modules that run in a rival's own environment import nothing of ``alignment``.
"""
