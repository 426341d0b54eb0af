"""``python -m agpo_megatron``."""

import sys

from agpo_megatron.cli import main

sys.exit(main())
