"""Golden runs: do two commits compute the same bits? ``make same``."""
