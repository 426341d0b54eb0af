"""The files that ``agpo-megatron prepare CONFIG`` writes before a demonstration run: data, and a checkpoint."""

from __future__ import annotations

from agpo_megatron.config.schema import Config


def prepare(config: Config) -> None:
    """Write what ``config.prepare.recipe`` makes, at the paths the config names. What is there already is kept.

    Raises DataError when a file of another recipe, seed or size lies at one of the paths, or an input is missing.
    """
    match config.prepare.recipe:
        case "none":
            return
        case "tiny_sums" | "tiny_sums_neutral" | "tiny_sums_needed" | "tiny_sums_overthinking":
            from agpo_megatron.data.recipes.tiny_sums import prepare_tiny_sums

            prepare_tiny_sums(config)
        case "smollm2_sums":
            from agpo_megatron.data.recipes.smollm2_sums import prepare_smollm2_sums

            prepare_smollm2_sums(config)
        case "smollm2_gsm8k":
            from agpo_megatron.data.recipes.smollm2_gsm8k import prepare_smollm2_gsm8k

            prepare_smollm2_gsm8k(config)
