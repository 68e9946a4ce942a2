"""The train function as Ray Train takes it.

Its controller unpickles function and config, and would import torch, transformers and DeepSpeed for it: seconds of
every start and of every restart, in a process that needs none of them. So both are kept small, and bytes, until a
worker opens them.
"""

import pickle


def work(task: bytes) -> None:
    """`components.training.worker.work` on the pickled task."""
    from components.training import worker

    worker.work(pickle.loads(task))
