"""The digests by which a checkpoint's files are known, on disks that fail."""

from __future__ import annotations

import errno
import os
import zlib
from pathlib import Path

import pytest

from agpo_megatron.policy import marker
from agpo_megatron.policy.marker import CheckpointDamaged, check_file, digest


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 100])
def test_the_digest_is_size_and_crc(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marker, "WINDOW", 16)
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    assert digest(tmp_path / "file") == [size, zlib.crc32(content)]


def test_what_cannot_be_read_is_damaged_and_what_may_not_be_read_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failing disk must lead to the checkpoint before; permissions are the user's to mend."""
    (tmp_path / "file").write_bytes(b"x")

    def fails(number: int) -> None:
        def reading(path: Path) -> list[int]:
            raise OSError(number, os.strerror(number), str(path))

        monkeypatch.setattr(marker, "digest", reading)

    for number in (errno.EIO, errno.ESTALE):
        fails(number)
        with pytest.raises(CheckpointDamaged, match=f"is damaged: file: .*{os.strerror(number)}"):
            check_file(tmp_path, "file", [1, 0])
    fails(errno.EACCES)
    with pytest.raises(PermissionError):
        check_file(tmp_path, "file", [1, 0])
