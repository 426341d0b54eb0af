"""The mathematics of AGPO and related methods as pure functions: no Megatron, HTTP, process groups or config.

Equations are numbered as in docs/algorithm.md.
"""
