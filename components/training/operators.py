"""Build DeepSpeed's communication operator once, as part of the installation.

`python -m components.training.operators`; later runs find it built.
"""

import os
import socket

from components.training.deepspeed_engine import prepare_environment


def build() -> None:
    """Start a process group of one; DeepSpeed compiles what it needs for it and keeps it. CUDA needs nothing."""
    import torch

    if torch.cuda.is_available():
        return
    prepare_environment("cpu")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    build()
