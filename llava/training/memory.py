"""Memory against speed, without another result: what is kept for the backward pass, and compiled layers."""

import functools
from typing import Any

import torch
from torch.nn import functional
from torch.utils import checkpoint
from transformers import AttentionInterface, PreTrainedModel

from llava.attention import PACKING
from llava.choices import Checkpointing
from llava.model import LlavaForTraining
from llava.packing import layers_of

_KEPT = (
    "mm",
    "addmm",
    "bmm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_flash_attention_forward",
    "_efficient_attention_forward",
    "torch_attn::_varlen_attn",
)
"""Operators whose results `selective` keeps: products of matrices, and attention."""


def checkpoint_activations(language_model: PreTrainedModel, how: Checkpointing) -> None:
    """Keep less of each decoder layer for the backward pass.

    `full` keeps a layer's input and computes the layer again. `selective` keeps what matrices and attention
    gave and computes only what lies between again. Gradients are those of `none`.
    """
    if how == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = functools.partial(checkpoint.create_selective_checkpoint_contexts, _policy)
    # The name changed in transformers 5.
    enable = getattr(language_model, "activation_checkpointing_enable", None)
    (enable or language_model.gradient_checkpointing_enable)(options)


def checkpoint_tower(tower: PreTrainedModel, how: Checkpointing) -> None:
    """The same of a vision tower that learns. It stays in evaluation mode: what it computes is what it answers with."""
    checkpoint_activations(tower, how)
    if how != "none":
        for layer in layers_of(tower):
            # Stock layers keep less in training mode only; their parts, which may drop out, are left as they are.
            layer.training = True


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> checkpoint.CheckpointPolicy:
    packet = getattr(operator, "overloadpacket", None)
    keep = packet is not None and packet._qualified_op_name.removeprefix("aten::") in _KEPT
    policy = checkpoint.CheckpointPolicy
    return policy.MUST_SAVE if keep else policy.PREFER_RECOMPUTE


def compile_layers(language_model: PreTrainedModel, backend: str = "inductor") -> None:
    """Compile each decoder layer; one program serves all layers and all lengths of rows.

    Attention stays as it is: how many samples a row packs would otherwise make a program each.
    """
    for name in PACKING.values():
        AttentionInterface.register(name, torch.compiler.disable(AttentionInterface()[name]))
    for layer in layers_of(language_model):
        layer.compile(dynamic=True, backend=backend)


def can_fuse_loss() -> bool:
    """Whether this torch has the vocabulary projection and its cross-entropy as one operation (2.13 on)."""
    return hasattr(functional, "linear_cross_entropy")


def fuse_loss(module: LlavaForTraining) -> None:
    """Compute the logits a chunk at a time, forward and again backward, so that they never exist whole."""
    head = module.stock.lm_head

    def forward(hidden_KD: torch.Tensor, targets_K: torch.Tensor) -> torch.Tensor:
        options = torch.nn.LinearCrossEntropyOptions(acc_policy="accurate")
        # In half precision torch adds up the losses in half precision, too: thousands of them are off by percents.
        losses_K = functional.linear_cross_entropy(
            hidden_KD, head.weight, targets_K, linear_bias=head.bias, reduction="none", options=options
        )
        return losses_K.float().sum()

    # Through the head's own call, so that ZeRO-3 brings its weight together.
    head.forward = forward
    module.loss = functools.partial(head)  # type: ignore[method-assign]
