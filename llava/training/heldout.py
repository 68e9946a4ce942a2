"""The loss on samples that training never sees, without leaving a trace in the training."""

import torch
from torch import distributed

from llava.data.collate import Collator
from llava.model import LlavaForTraining
from llava.training.engine import Engine


def heldout_loss(engine: Engine, module: LlavaForTraining, collator: Collator, steps: int) -> float:
    """Mean loss (nats) per supervised token over `steps` steps of `collator`. All ranks call it, equally often.

    No gradient, no dropout; `module` is the one that `engine` trains, and is left in the mode it was in.
    """
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    language_model = module.stock.model.language_model
    was_training = language_model.training
    language_model.eval()
    try:
        with torch.no_grad():
            for step in collator.steps(0, steps, engine.rank, engine.world, device=engine.device):
                for row in step.rows:
                    total[0] += engine.loss(row.to(engine.device))
                total[1] += step.supervised / engine.world
    finally:
        language_model.train(was_training)
    if engine.world > 1:
        distributed.all_reduce(total)
    loss_sum, supervised = total.tolist()
    return float(loss_sum / supervised)
