"""A tower or a language model from outside: a hub repository at a pinned commit, or a local folder.

Only files with weights, configs and vocabularies are taken; code is neither fetched nor run. Weights that exist
as PyTorch pickles only are rewritten as safetensors (`pickled.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.backbones import pickled
from components.contract.digest import fingerprint
from llava.errors import LlavaError, RefusedInput
from llava.towers import family_of

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w.-]+")
_TEXTS = ["*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt"]
_WEIGHTS = ["model.safetensors", "model-?????-of-?????.safetensors"]
_PICKLES = ["pytorch_model.bin", "pytorch_model-?????-of-?????.bin"]
_INDEX, _PICKLED_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class WeightsSource:
    """Where a part comes from. `revision` is the commit of a hub repository, None for a folder."""

    what: str
    """The setting's name, for messages: "vision" or "language"."""
    location: str
    revision: str | None

    @property
    def folder(self) -> Path | None:
        """The local folder, or None for a hub repository."""
        if self.location.startswith(("/", "./", "../", "~")) or self.location in (".", ".."):
            return Path(self.location).expanduser()
        return None

    def malformed(self) -> str | None:
        """What is wrong with how the source is written, in one line; None where nothing is."""
        if self.folder is not None:
            if self.revision is not None:
                return f"{self.what}_revision is for hub repositories; {self.location} is a folder"
            return None
        if not _HUB_ID.fullmatch(self.location):
            return (
                f"{self.what}={self.location!r}: give OWNER/NAME on the hub, or a folder as /PATH or ./PATH"
            )
        if self.revision is not None and not _is_commit(self.revision):
            return (
                f"{self.what}_revision={self.revision!r} is no commit: give the 40 hexadecimal digits that "
                f"the history of {self.location} shows; branches and tags move"
            )
        return None

    def digest(self) -> str:
        """What stands for the contents: the commit, or the folder's fingerprint. Raises `RefusedInput`."""
        if (folder := self.folder) is not None:
            if not folder.is_dir():
                raise RefusedInput(f"backbones.{self.what}={self.location}: no such folder")
            return fingerprint(folder)
        if self.revision is None:
            raise RefusedInput(
                f"backbones.{self.what}_revision is missing: the commit of {self.location} that you want, 40 "
                f"hexadecimal digits from its history on the hub: --set backbones.{self.what}_revision=..."
            )
        return f"{self.location}@{self.revision}"

    def fetch(self, scratch: Path, say: Callable[[str], None]) -> Path:
        """A folder with the files, weights as safetensors; `scratch` is a folder that may be filled."""
        found = self.folder if self.folder is not None else self._download(say)
        return as_safetensors(found, scratch, say)

    def _download(self, say: Callable[[str], None]) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
        say(f"{self.what}: fetching {self.location} at {self.revision}")

        def get(patterns: list[str]) -> Path:
            # The hub's own cache keeps what came before a crash.
            endpoint = os.environ.get("HF_ENDPOINT")
            return Path(
                snapshot_download(
                    self.location, revision=self.revision, allow_patterns=patterns, endpoint=endpoint
                )
            )

        try:
            folder = get(_TEXTS + _WEIGHTS)
            if not any(folder.glob("*.safetensors")):
                folder = get(_TEXTS + _PICKLES)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            missing = "commit" if isinstance(error, RevisionNotFoundError) else "repository"
            raise RefusedInput(
                f"backbones.{self.what}={self.location}: the hub shows no such {missing} "
                f"({self.revision}); a private or gated one needs HF_TOKEN in the environment"
            ) from None
        except Exception as error:
            if not isinstance(error, (HfHubHTTPError, OSError, *_errors_of_its_client())):
                raise
            reason = " ".join(str(error).split())[:300]
            raise LlavaError(
                f"backbones.{self.what}={self.location}: the hub does not answer: {reason}"
            ) from error
        return folder


def _errors_of_its_client() -> tuple[type[Exception], ...]:
    """What the hub's HTTP client raises: older versions of the hub's library let it through, and its name changed."""
    return tuple(sys.modules[name].HTTPError for name in ("httpx", "httpx2") if name in sys.modules)


def _is_commit(revision: str) -> bool:
    """40 hexadecimal digits that somebody looked up: a row of one digit is a placeholder."""
    return bool(_COMMIT.fullmatch(revision)) and len(set(revision)) > 4


def as_safetensors(found: Path, scratch: Path, say: Callable[[str], None]) -> Path:
    """`found` itself where its weights are safetensors; else a folder in `scratch` with them rewritten."""
    from llava import pretrained

    if any(found.glob("*.safetensors")):
        return found
    pickles = sorted({path for pattern in _PICKLES for path in found.glob(pattern)})
    if not pickles:
        raise RefusedInput(f"{found}: holds neither *.safetensors nor pytorch_model*.bin: no weights")
    scratch.mkdir(parents=True, exist_ok=True)
    for path in found.iterdir():
        if path.is_file() and path.suffix in (".json", ".model", ".jinja", ".txt"):
            (scratch / path.name).symlink_to(path.resolve())
    names = {
        path.name: path.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
        for path in pickles
    }
    for path in pickles:
        say(f"{path.name} -> {names[path.name]}")
        pickled.rewrite(path, scratch / names[path.name])
    if (found / _PICKLED_INDEX).is_file():
        with pretrained.reading(f"{found / _PICKLED_INDEX}: cannot be read"):
            index = json.loads((found / _PICKLED_INDEX).read_text())
            index["weight_map"] = {name: names[file] for name, file in index["weight_map"].items()}
            (scratch / _INDEX).write_text(json.dumps(index))
    return scratch


def load_vision(folder: Path, what: str) -> tuple[Any, Any]:
    """The vision tower and its image processor; of a model with a text half its vision half."""
    from llava import pretrained

    with _named(what):
        config_class, model_class = family_of(_config(folder).get("model_type")).classes()
        config = pretrained.config(config_class, folder)
        tower = pretrained.model(model_class, folder, dtype="auto", config=config)
        return tower, pretrained.image_processor(folder)


def load_language(folder: Path, what: str) -> tuple[Any, Any]:
    """The language model, in the precision it is stored in, and its tokenizer.

    Raises `RefusedInput` for one that a LLaVA would train or ask otherwise than stock transformers does; that is
    measured before the weights are read.
    """
    from llava import faithful, pretrained

    with _named(what):
        faithful.check_language_model(pretrained.any_config(folder))
        return pretrained.causal_language_model(folder), pretrained.tokenizer(folder)


def _config(folder: Path) -> dict[str, Any]:
    from llava import pretrained

    with pretrained.reading(f"{folder}/config.json"):
        found = json.loads((folder / "config.json").read_bytes())
        return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """A refusal begins with the setting that names the folder."""
    try:
        yield
    except RefusedInput as error:
        raise RefusedInput(f"{what}: {error}") from error
