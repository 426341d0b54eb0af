"""Fails unless the NCCL that this Python loads with torch is the one of nccl.txt, given as the only argument."""

import ctypes
import re
import sys
from pathlib import Path

import torch  # loads its NCCL

wanted = re.findall(r"^nvidia-nccl-cu13==(\S+)$", Path(sys.argv[1]).read_text(), re.MULTILINE)[0]
code = ctypes.c_int()
ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(code))
found = f"{code.value // 10000}.{code.value // 100 % 100}.{code.value % 100}"
sys.stdout.write(f"torch {torch.__version__}, NCCL {found}\n")
if found != wanted:
    sys.exit(f"NCCL {found} is loaded, {wanted} is pinned: install nccl.txt last, with --no-deps")
