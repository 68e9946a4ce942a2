"""What training ends with: the stock folder it began with, with what was learned put in, a file at a time.

No process holds the model. What was not learned is read from the folder's own files, which the system maps into memory;
what was learned comes from a checkpoint, a decoder layer at a time. The files can be written by several ranks.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from llava import export, lora
from llava import model as models
from llava.choices import Fit
from llava.tensor_file import Form, TensorFile
from llava.towers import family_of

LARGEST = 2 << 30
"""Bytes of a file: so many ranks can write at the same time."""
_BLOCK = re.compile(r"(.*\.layers\.\d+)\.")
"""What transformers converts together on loading, such as the experts of a layer, lies in one layer."""


@dataclass(frozen=True)
class ModelFile:
    """One file of weights."""

    name: str
    blocks: tuple[str, ...]


class Learned:
    """The model that a folder and what was learned make.

    `read(name, shape)` gives a learned parameter in fp32; `names` are those of all of them: stock parameters, or
    `adapters`, which are merged into theirs in fp32. The weights are rounded to `dtype` once, at the end.
    """

    def __init__(
        self,
        source: Path,
        names: set[str],
        read: Callable[[str, torch.Size], torch.Tensor],
        dtype: torch.dtype,
        adapters: lora.Lora | None = None,
        largest: int = LARGEST,
    ) -> None:
        self._source, self._read, self._dtype, self._adapters = source, read, dtype, adapters
        self._stock = models.load(source, models.stored_dtype(source) or torch.float32)
        own = {id(parameter): name for name, parameter in self._stock.named_parameters()}
        state = remove_tied_weights_from_state_dict(self._stock.state_dict(keep_vars=True), self._stock)
        self._values = {name: value.detach() for name, value in state.items()}
        self._learned = {name: own[id(value)] for name, value in state.items() if own.get(id(value)) in names}
        self._thin: dict[str, dict[str, torch.Size]] = {}
        """By stock parameter: the shapes of its adapters' parameters."""
        if adapters is not None:
            thin = models.empty(self._stock.config)
            lora.inject(thin, adapters, seed=0)
            shapes = {name: parameter.shape for name, parameter in thin.named_parameters()}
            for name in sorted(names - set(self._learned.values())):
                self._thin.setdefault(lora.base_name(name), {})[name] = shapes[name]
        self._blocks: dict[str, list[str]] = {}
        for name in self._values:
            found = _BLOCK.match(name)
            self._blocks.setdefault(found[1] if found else name, []).append(name)
        self._forms = {block: self._forms_of(members) for block, members in self._blocks.items()}
        self.files = list(self._split(largest))

    def write(self, file: ModelFile, folder: Path) -> None:
        """Write one of `files` into `folder`."""
        forms = {name: form for block in file.blocks for name, form in self._forms[block].items()}
        with TensorFile(folder / file.name, forms) as out:
            for block in file.blocks:
                values = {name: self._value(name) for name in self._blocks[block]}
                for name, value in self._named(values).items():
                    out.put(name, value)

    def write_rest(self, folder: Path, fit: Fit, template: str) -> None:
        """Everything but the weights: configs, tokenizer, image processor, and which weight lies in which file."""
        weight_map = {
            name: file.name for file in self.files for block in file.blocks for name in self._forms[block]
        }
        total = sum(form.bytes for forms in self._forms.values() for form in forms.values())
        models.save_around(
            self._stock,
            self._dtype,
            models.load_processor(self._source, fit),
            folder,
            template,
        )
        if len(self.files) > 1:
            export.write_index(folder, weight_map, total)

    def _split(self, largest: int) -> Iterator[ModelFile]:
        groups: list[list[str]] = [[]]
        size = 0
        for block, forms in self._forms.items():
            more = sum(form.bytes for form in forms.values())
            if groups[-1] and size + more > largest:
                groups.append([])
                size = 0
            groups[-1].append(block)
            size += more
        for number, blocks in enumerate(groups, start=1):
            yield ModelFile(export.file_name(number, len(groups)), tuple(blocks))

    def _forms_of(self, members: list[str]) -> dict[str, Form]:
        with torch.device("meta"):
            promised = {
                name: torch.empty(self._values[name].shape, dtype=self._dtype_of(self._values[name]))
                for name in members
            }
        return {name: Form.of(value) for name, value in self._named(promised).items()}

    def _named(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As they are called and cut on the hub."""
        vision: Any = self._stock.config.vision_config
        prefix = family_of(vision.model_type).hub_prefix
        converted = revert_weight_conversion(self._stock, dict(values))
        return {export.hub_name(name, prefix): value for name, value in converted.items()}

    def _value(self, name: str) -> torch.Tensor:
        value = self._values[name]
        if name in self._learned:
            value = self._read(self._learned[name], value.shape)
        elif self._adapters is not None and (thin := self._thin.get(name)):
            adapters = {each: self._read(each, shape) for each, shape in thin.items()}
            value = lora.merged(name, value, adapters, self._adapters)
        return value.to(self._dtype_of(value))

    def _dtype_of(self, value: torch.Tensor) -> torch.dtype:
        return self._dtype if value.is_floating_point() else value.dtype
