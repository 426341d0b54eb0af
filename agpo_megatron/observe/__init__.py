"""Metrics, live progress, curves and summary of a run. Reads numbers, decides nothing."""
