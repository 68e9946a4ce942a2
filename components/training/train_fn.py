"""The train function as Ray Train takes it.

Its controller unpickles function and config, and would import torch, transformers and DeepSpeed for it: seconds of
every start and of every restart, in a process that needs none of them. So both are kept small, and bytes, until a
worker opens them.
"""

import os
import pickle


def work(task: bytes) -> None:
    """`components.training.worker.work` on the pickled task."""
    from components.training import worker

    worker.work(pickle.loads(task))


def environment(threads: int, gpu: bool) -> dict[str, str]:
    """Environment of every worker process, set before it starts."""
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR")
    return {
        "OMP_NUM_THREADS": str(threads),
        "DS_ACCELERATOR": "cuda" if gpu else "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        **({"TORCH_EXTENSIONS_DIR": extensions} if extensions else {}),
    }
