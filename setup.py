"""Package definition. Pinned engines are installed by launch/install.sh, which says why they are not listed here."""

from setuptools import find_packages, setup

setup(
    name="agpo_megatron",
    version="0.1.0",
    description="AGPO on a Megatron-Core policy with SGLang rollouts: auditable, Slurm-native, no Ray",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["agpo_megatron", "agpo_megatron.*"]),
    include_package_data=True,
    package_data={
        "agpo_megatron.rollout": ["stand_ins/**/*"],
        "agpo_megatron.observe.report": ["page.*"],
    },
    install_requires=[
        "torch>=2.6",
        "transformers",
        "safetensors",
        "datasets",
        "pyarrow",
        "pydantic>=2.7",
        "pyyaml",
        "aiohttp",
        "math-verify",
        "msgspec",
        "requests",
        "numpy",
        "pandas",
        "scipy",
        "rich",
        "matplotlib",
        "plotly==7.1.0",
        "tensorboard",
        "psutil",
        "prometheus-client",
    ],
    extras_require={"gguf": ["gguf"], "wandb": ["wandb"], "mlflow": ["mlflow-skinny"]},
    entry_points={"console_scripts": ["agpo-megatron=agpo_megatron.cli:main"]},
)
