"""``pytorch/attention/__init__.py`` exports no ``_SplitAlongDim``: megatron-core then splits by torch."""
