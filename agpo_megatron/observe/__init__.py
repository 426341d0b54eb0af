"""What a run shows of itself: metrics, live progress, curves, summary. Reads numbers, decides nothing."""
