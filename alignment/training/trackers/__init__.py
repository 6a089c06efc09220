"""Trackers, to which curves, samples and results are sent besides the files; one module per tracker."""
