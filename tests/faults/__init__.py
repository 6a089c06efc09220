"""Deliberate faults that no operator of a mutation tool makes, each of which a test must notice: ``make faults``."""
