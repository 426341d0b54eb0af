"""The mathematics of AGPO and its kin as pure functions: no Megatron, HTTP, process groups, config.

Equations are numbered as in docs/algorithm.md.
"""
