"""QLoRA's base: the matrices of the language model's linear layers in 4 bit, everything else as it was.

Source: arXiv 2305.14314, section 3: NF4 in blocks of 64, the blocks' scales quantised once more, and arithmetic in the
precision of training on weights that are dequantised where they are used. Needs `bitsandbytes`, which nothing else
does. Quantised are the linear layers of the language model alone: not the vocabulary projection, the embedding, the
projector or the vision tower.

What is exported is not the quantised base. Its adapters are added to the weights that the stage began with, in fp32
(`llava.lora.merged`), and the model has 16 bit again. This is a choice of this project, which the paper does not make:
it answers with the adapters on the quantised base. The price is that adapters which learned beside rounded weights are
added to those before rounding, so the model differs from the trained one by about what quantising did to the base;
`tests/llava/test_quantized.py` measures both. The gain is a stock model that needs no bitsandbytes to answer.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from llava.errors import RefusedInput
from llava.lora import linear_layers, stacks
from llava.sizes import NF4_BLOCK


def available() -> bool:
    """Whether bitsandbytes is installed."""
    return find_spec("bitsandbytes") is not None


def refuse_experts(kind: str, fused: int, prefix: str = "") -> None:
    """Raise `RefusedInput` for a language model with `fused` stacks of experts, most of which would stay as it is.

    `prefix`: of the settings in the message, such as `finetune.`.
    """
    if fused:
        raise RefusedInput(
            f"language model of type {kind!r}: its fused experts cannot be kept in 4 bit: set {prefix}lora_bits=16"
        )


@torch.no_grad()
def quantize(
    model: Any,
    device: torch.device,
    dtype: torch.dtype | None = None,
    see: Callable[[str, nn.Parameter], None] | None = None,
) -> None:
    """Put each linear layer of a stock LLaVA's language model on `device` in 4 bit, one after the other.

    No more than one matrix is on the device in its own precision. The rest of the model stays where it is. `dtype` is
    that of training, in which the weights are when they are quantised; None: their own. `see` is given each matrix
    before: what is quantised may differ in its last bits from one device to another. Comes after `set_trainable`,
    since numbers of 4 bit have no gradient, and before `lora.inject`. Raises `RefusedInput` for fused experts.
    """
    if not available():
        raise RefusedInput("4-bit weights need bitsandbytes: pip install 'llava-workflow[qlora]'")
    language = model.model.language_model
    refuse_experts(language.config.model_type, sum(1 for _ in stacks(language)))
    for name, linear in list(linear_layers(language)):
        weight = linear.weight.detach().to(device, dtype)
        if see is not None:
            see(f"{name}.weight", nn.Parameter(weight, requires_grad=False))
        language.set_submodule(name, _in_4_bit(linear, weight, device, dtype))


def _in_4_bit(
    linear: nn.Linear, weight: torch.Tensor, device: torch.device, dtype: torch.dtype | None
) -> nn.Module:
    import bitsandbytes

    layers: Any = bitsandbytes.nn
    made: Any = layers.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    codes, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    made.weight = layers.Params4bit(
        codes, quant_state=state, blocksize=NF4_BLOCK, quant_type="nf4", module=made, bnb_quantized=True
    )
    made.quant_state = state
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach().to(device, dtype), requires_grad=False)
    # On some CPUs an answer without gradients would lay the weights out anew, for good.
    made.support_avx512bf16_for_cpu = False
    made.train(linear.training)
    return made  # type: ignore[no-any-return]
