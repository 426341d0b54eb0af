"""Run by file name with another environment's Python, which need not have this project: what is installed there?

Argument: JSON [names of packages, names of modules to import]. Prints JSON {versions: {...}, broken: {module: why}}.
With torch among the modules, ``nccl`` is the version of the library that is loaded with it (torch itself only tells
which one it was built against).
"""

import ctypes
import importlib
import json
import platform
import sys
from importlib import metadata


def loaded_nccl() -> str:
    """``2.30.7``, or "" where there is none (a build of torch without CUDA)."""
    try:
        library = ctypes.CDLL("libnccl.so.2")
    except OSError:
        return ""
    code = ctypes.c_int()
    library.ncclGetVersion(ctypes.byref(code))
    # nccl.h: NCCL_VERSION, from 2.9 on major * 10000 + minor * 100 + patch
    return f"{code.value // 10000}.{code.value // 100 % 100}.{code.value % 100}"


def main() -> None:
    packages, modules = json.loads(sys.argv[1])
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    broken = {}
    for name in modules:
        try:
            importlib.import_module(name)
            if name == "torch" and (nccl := loaded_nccl()):
                versions["nccl"] = nccl
        except Exception as error:
            broken[name] = f"{type(error).__name__}: {error}"
    sys.stdout.write("\n" + json.dumps({"versions": versions, "broken": broken}) + "\n")


if __name__ == "__main__":
    main()
