"""What training takes of a machine's own memory and of its disk: the start, checkpoints, the export.

Plain arithmetic, as in `llava.estimate`. A rank loads the model memory-mapped: its files are in memory once per node,
shared by all ranks, and the system may let go of them. What belongs to a rank: the program, a copy of its share of
the state while a checkpoint is written, a decoder layer while the model is written, and the optimizer where it is
offloaded. All sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from llava.estimate import GIB, Setup
from llava.sizes import Sizes

PROGRAM = 4 * GIB
"""Of one rank: Python with torch, the CUDA context's part on the host, rows and pictures of the next steps. A rank on a
CPU was measured at 1.2 GiB; the rest is what CUDA and NCCL are known to take, and room."""
STATE = 12
"""Bytes of a checkpoint per parameter that learns: its fp32 weight and two fp32 moments."""


@dataclass(frozen=True)
class HostMemory:
    """Of one rank, but for `mapped`."""

    program: float
    saving: float
    """The copy of the rank's share that is on its way to the disk."""
    exporting: float
    """The largest piece with what it learned: as it is read, in fp32, and as it is written."""
    offloaded: float
    """fp32 weights, moments and gradients, where the optimizer works on the host."""
    mapped: float
    """The model's files, once per node; the system takes this memory back when it is short of it."""

    @property
    def rank(self) -> float:
        """What a rank takes at its peak: a checkpoint and the export do not happen at the same time."""
        return self.program + self.offloaded + max(self.saving, self.exporting)

    def node(self, ranks: int) -> float:
        """What `ranks` ranks on one node take, with the model's files."""
        return ranks * self.rank + self.mapped


def host_memory(sizes: Sizes, setup: Setup) -> HostMemory:
    """What each rank of `setup.gpus` takes of its node's memory."""
    share = sizes.trainable(setup.training, setup.lora_rank, setup.tower) / setup.gpus
    layer = max(sizes.language.layer_weights, sizes.language.vocabulary * sizes.language.hidden)
    return HostMemory(
        program=PROGRAM,
        saving=STATE * share,
        exporting=(8 + setup.element) * layer,
        offloaded=(STATE + 4) * share if setup.offload else 0,
        mapped=setup.element * sizes.parameters,
    )


def checkpoint_bytes(sizes: Sizes, setup: Setup) -> int:
    """What one checkpoint takes of the disk or the bucket."""
    return STATE * sizes.trainable(setup.training, setup.lora_rank, setup.tower)


def model_bytes(sizes: Sizes, setup: Setup) -> int:
    """What the stage's model takes there."""
    return setup.element * sizes.parameters
