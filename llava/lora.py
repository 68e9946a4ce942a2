"""LoRA on the language model: thin matrices beside the matrices of its layers, merged into them for the artifact.

Source: arXiv 2106.09685. The recipe for LLaVA v1.5 (rank 128, alpha 256, all linear layers, a rate of its own for
the projector) is that of its authors' script, since the paper (arXiv 2310.03744) gives none; it stands in
`workflows/presets/llava-v1.5-7b-lora.yaml`. Needs `peft`, which nothing else does.

Adapters go beside every linear layer, and beside every expert of a mixture of experts that keeps its experts in one
tensor of three dimensions (transformers 5). Those tensors are found by what they are, not by the model's type. Left
out on purpose: routers, since a moved router sends tokens to experts that never saw them, and what is no matrix
(norms, biases, convolutions).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from llava import pretrained
from llava.errors import RefusedInput
from llava.packing import layers_of

_TRANSPOSED = "^T"
"""Ends the name of an adapter whose experts are kept as (experts, inputs, outputs): a square one does not show it."""
_ADAPTER = re.compile(r"\.lora_[AB]\.([^.]+)\.weight$")
_LINEAR = "default"


@dataclass(frozen=True)
class Lora:
    """The shape of the adapters."""

    rank: int = 128
    alpha: int = 256
    """The product of the thin matrices counts alpha / rank times."""
    dropout: float = 0.05
    """Of the adapters' input, while training."""


@dataclass(frozen=True)
class Reach:
    """What of a language model gets adapters."""

    share: float
    """Of the weights of its layers, between 0 and 1."""
    fused: int
    """Tensors that hold the matrices of several experts."""


def available() -> bool:
    """Whether peft is installed."""
    return find_spec("peft") is not None


def reach(config: Any) -> Reach:
    """What of a language model with this config gets adapters; no weights are made."""
    with torch.device("meta"):
        return _reach(pretrained.random_language_model(config))


def _reach(text: Any) -> Reach:
    layers = layers_of(text)
    fused = [parameter.numel() for _, _, parameter in stacks(layers)]
    linear = [module.weight.numel() for _, module in linear_layers(layers)]
    return Reach((sum(fused) + sum(linear)) / sum(p.numel() for p in layers.parameters()), len(fused))


def check(config: Any, lora: Lora, prefix: str = "") -> Reach:
    """What of a language model with this config gets adapters. Raises `RefusedInput` where they cannot be put.

    `prefix`: of the settings in the message, such as `finetune.`.
    """
    found = reach(config)
    _refuse(config.model_type, found, lora, prefix)
    return found


def _refuse(kind: str, found: Reach, lora: Lora, prefix: str) -> None:
    if not found.share:
        raise RefusedInput(
            f"language model of type {kind!r}: LoRA finds no linear layers and no experts in it: set {prefix}lora=false"
        )
    if found.fused and lora.dropout:
        # The adapters of an expert change its weights, not its result: there is no input of theirs to drop.
        raise RefusedInput(
            f"language model of type {kind!r}: the adapters of its fused experts have no dropout: "
            f"set {prefix}lora_dropout=0 (it is {lora.dropout:g})"
        )


def linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Each linear layer, by its name."""
    for name, found in module.named_modules():
        if isinstance(found, nn.Linear):
            yield name, found


def stacks(module: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Each stack of matrices: the name of the module that has it, its own name there, the parameter.

    Torch's own modules have three dimensions for convolutions; a stack of one, or of vectors, is none of matrices.
    """
    for name, found in module.named_modules():
        if type(found).__module__.startswith("torch."):
            continue
        for own, parameter in found.named_parameters(recurse=False):
            if parameter.dim() == 3 and min(parameter.shape) > 1 and parameter.is_floating_point():
                yield name, own, parameter


def inject(model: Any, lora: Lora, seed: int) -> None:
    """Put trainable adapters beside every linear layer and every expert of the language model; its weights freeze.

    The vocabulary projection is none of those layers. The adapters give nothing at first, so the model's output
    stays what it was. `seed` makes the start the same on every rank. Raises `RefusedInput` as `check`.
    """
    if not available():
        raise RefusedInput("LoRA needs peft: pip install 'llava-workflow[lora]'")
    from peft import LoraConfig, inject_adapter_in_model

    language = model.model.language_model
    _refuse(language.config.model_type, _reach(language), lora, "")
    # Where peft sees a config, it reads names of layers as those of an older transformers, and wraps experts unasked.
    bare = nn.ModuleDict({"language": language})
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias="none",
        target_modules=[name for name, _ in linear_layers(bare)],
    )
    fused = [(name, own) for name, own, _ in stacks(language)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, bare, adapter_name=_LINEAR)
        for name, own in fused:
            _wrap(language, name, own, config)
    for name, parameter in language.named_parameters():
        parameter.requires_grad_("lora_" in name)
    model.lm_head.requires_grad_(False)


def _wrap(language: nn.Module, name: str, own: str, config: Any) -> None:
    """What peft's `target_parameters` does, with the parameter's name as the adapter's.

    peft nests the wrappers of one module and numbers nothing: the names alone would not say whose adapter it is.
    """
    from peft.tuners.lora import ParamWrapper

    module = language.get_submodule(name)
    experts = module.get_base_layer() if isinstance(module, ParamWrapper) else module
    adapter = own + (_TRANSPOSED if getattr(experts, "is_transposed", False) else "")
    wrapper = ParamWrapper(module, adapter, own, config, r=config.r, lora_alpha=config.lora_alpha)
    language.set_submodule(name, wrapper)


def merge(model: Any) -> None:
    """Add what the adapters learned to the weights and take the adapters away: a stock model again."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            # A wrapper inside another one leaves with it.
            if not name.endswith(".base_layer"):
                model.set_submodule(name, module.get_base_layer())


def base_name(adapter_parameter_name: str) -> str:
    """The stock parameter that an adapter's parameter belongs to.

    `...q_proj.lora_A.default.weight` -> `...q_proj.weight`;
    `...experts.base_layer.lora_B.gate_up_proj.weight` -> `...experts.gate_up_proj`.
    Raises ValueError for the name of anything else.
    """
    found = _ADAPTER.search(adapter_parameter_name)
    if found is None:
        raise ValueError(f"{adapter_parameter_name} is no adapter's parameter")
    module = adapter_parameter_name[: found.start()].replace(".base_layer", "")
    adapter = found.group(1).removesuffix(_TRANSPOSED)
    return f"{module}.{'weight' if adapter == _LINEAR else adapter}"


def merged(name: str, base: torch.Tensor, adapters: Mapping[str, torch.Tensor], lora: Lora) -> torch.Tensor:
    """The weight of the stock parameter `name` with what its adapters learned, in fp32, as `merge` gives it.

    `base`: (outputs, inputs), or (experts, ., .) for fused experts. `adapters`: by their names in the model that
    trained, those of other parameters among them; without one of its own, the weight is `base`.
    """
    own = {key: value.float() for key, value in adapters.items() if base_name(key) == name}
    weight = base.float().clone()
    if not own:
        return weight
    (key_a, a), (_, b) = sorted(own.items())
    scaling = lora.alpha / lora.rank
    if base.dim() == 2:
        weight += (b @ a) * scaling
        return weight
    # As peft keeps them: A is (experts * rank, inputs), B is (outputs, rank * experts).
    a_erI = a.reshape(len(base), -1, a.shape[-1])
    b_Ore = b.reshape(len(b), -1, len(base))
    result = "eIO" if key_a.endswith(f"{_TRANSPOSED}.weight") else "eOI"
    weight += torch.einsum(f"Ore,erI->{result}", b_Ore, a_erI) * scaling
    return weight
