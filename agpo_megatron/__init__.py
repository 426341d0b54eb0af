"""AGPO on a Megatron-Core policy with SGLang rollouts. See docs/design.md for the map."""

__version__ = "0.1.0"
