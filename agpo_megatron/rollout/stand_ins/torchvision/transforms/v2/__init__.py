"""Package of the second-generation transforms; only ``functional`` is imported."""
