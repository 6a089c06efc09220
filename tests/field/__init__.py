"""Whole small runs that are drawn at random, held to what must be true of any run: ``make field``."""
