"""Deliberate faults in the wiring, each with a test that must notice it: ``python -m tests.mutations``."""
