"""``python -m agpo_megatron.reward.worker``: verifies answers read from stdin, one JSON list a line.

Ends when its owner closes stdin or dies. Imports nothing heavy.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys

from agpo_megatron.reward.numeric import verify_numeric

PR_SET_PDEATHSIG = 1
VERIFIERS = {"numeric": verify_numeric}


def main() -> None:
    """Each line ``{"verifier", "answer", "response"}`` is answered by ``{"correct"}`` or ``{"error"}``."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for line in sys.stdin:
        task = json.loads(line)
        try:
            correct = VERIFIERS[task["verifier"]](task["answer"], task["response"])
            reply: dict[str, object] = {"correct": correct}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
