"""What the server of `tests/support/process_group.py` imports once for all its processes."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: F401

from llava.training import loop  # noqa: F401
