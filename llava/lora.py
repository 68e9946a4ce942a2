"""LoRA on the language model: thin matrices beside its linear layers, merged into them for the artifact.

Source: arXiv 2106.09685. The recipe for LLaVA v1.5 (rank 128, alpha 256, all linear layers, a rate of its own for
the projector) is that of its authors' script, since the paper (arXiv 2310.03744) gives none; it stands in
`workflows/presets/llava-v1.5-7b-lora.yaml`. Needs `peft`, which nothing else does.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from llava.errors import RefusedInput


@dataclass(frozen=True)
class Lora:
    """The shape of the adapters."""

    rank: int = 128
    alpha: int = 256
    """The product of the thin matrices counts alpha / rank times."""
    dropout: float = 0.05
    """Of the adapters' input, while training."""


def available() -> bool:
    """Whether peft is installed."""
    return find_spec("peft") is not None


def inject(model: Any, lora: Lora, seed: int) -> None:
    """Put trainable adapters beside every linear layer of the language model; its own weights freeze.

    The vocabulary projection is none of those layers. The adapters give nothing at first, so the model's output
    stays what it was. `seed` makes the start the same on every rank.
    """
    if not available():
        raise RefusedInput("LoRA needs peft: pip install 'llava-workflow[lora]'")
    from peft import LoraConfig, inject_adapter_in_model

    language = model.model.language_model
    linear = [name for name, module in language.named_modules() if isinstance(module, nn.Linear)]
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, bias="none", target_modules=linear
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, language)
    for name, parameter in language.named_parameters():
        parameter.requires_grad_("lora_" in name)
    model.lm_head.requires_grad_(False)


def merge(model: Any) -> None:
    """Add what the adapters learned to the weights and take the adapters away: a stock model again."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())


def base_name(adapter: str) -> str:
    """The stock parameter that an adapter's parameter belongs to."""
    module, _, _ = adapter.partition(".lora_")
    return f"{module}.weight"


def merged(name: str, base: torch.Tensor, adapters: dict[str, torch.Tensor], lora: Lora) -> torch.Tensor:
    """The stock parameter `name` with what its adapters learned, in fp32: what `merge` makes of it there.

    `adapters`: the adapters' parameters by their names in the model.
    """
    module = name.removesuffix(".weight")
    down, up = (adapters[f"{module}.lora_{matrix}.default.weight"] for matrix in "AB")
    return base.float() + (up @ down) * (lora.alpha / lora.rank)
