"""The settings of a training stage: what changes the result, and what only says how to run it.

Whatever cannot work together is refused here, when the config is read, before anything starts.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, PositiveInt, field_validator, model_validator

from components.contract.component import Settings, run_field
from components.contract.secrets import refuse_secrets
from components.training.deepspeed_config import deepspeed_config, read_json
from llava.choices import Checkpointing, Fit
from llava.errors import RefusedInput
from llava.sizes import Training
from llava.templates import NAMES

if TYPE_CHECKING:
    from llava.lora import Lora

AUTO = "auto"
WITHOUT_GPU: dict[str, Any] = {"zero_stage": 2, "tokens_per_row": 4096, "checkpointing": "none"}
"""What may be `auto` (see auto.py), and what stands in where there is no GPU to choose by."""


class Layout(NamedTuple):
    """How a stage lies on its devices: values of `WITHOUT_GPU`'s keys, none of them `auto`."""

    zero_stage: int
    tokens_per_row: int
    checkpointing: Checkpointing


class Extra(Settings):
    """A further dataset."""

    uri: str = Field(
        json_schema_extra={"run": True},
        description="A dataset artifact, or a folder (here or as s3://BUCKET/PREFIX) of Parquet files in the schema of "
        "llava/data/schema.py; it enters by its digest or fingerprint",
    )
    weight: float = Field(
        1.0, gt=0, description="Times that each of its samples is seen in an epoch; 0.5: every other one"
    )
    follow_links: bool | None = run_field(
        None,
        description="Links in a folder: null follows those that stay inside it, true all, false none. What is not "
        "followed is not read and is counted",
    )

    @field_validator("uri")
    @classmethod
    def _no_secret(cls, uri: str) -> str:
        return refuse_secrets(uri, "the URI of a further dataset")


class TrainSettings(Settings):
    """Both stages; `pretrain` and `finetune` give the defaults."""

    template: str = Field(
        description="How turns are written: a row of llava/templates.py, or `tokenizer`, its own"
    )
    epochs: float = Field(1.0, gt=0, description="Times that every sample is seen")
    global_batch: int = Field(gt=0, description="Samples per update, over all workers")
    learning_rate: float = Field(gt=0, description="Peak rate, after the warm-up")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the updates with a rising rate")
    warmup_from_zero: bool = Field(
        False,
        description="The first update has rate 0, as with the HF Trainer; else the warm-up is one update ahead",
    )
    projector_learning_rate: float | None = Field(
        None, gt=0, description="The projector's own peak rate; none: learning_rate"
    )
    weight_decay: float = Field(
        0.0, ge=0, description="AdamW's decay of matrices; biases and norms have none"
    )
    gradient_clipping: float = Field(1.0, ge=0, description="Largest gradient norm; 0 does not clip")
    max_length: int = Field(
        2048, gt=0, description="Tokens per sample, images counted; longer ones are cut once"
    )
    max_lost: float = Field(0.02, ge=0, le=1, description="Share of refused samples over which the run fails")
    max_truncated: float = Field(
        0.05, ge=0, le=1, description="Share of samples cut at max_length over which the run fails"
    )
    extra: tuple[Extra, ...] = Field(
        (), description="Further datasets beside the workflow's own, which has weight 1: [{uri, weight}]"
    )
    image_fit: Fit = Field(
        "model",
        description="How a picture becomes a square: pad (v1.5: all of it on the mean colour), crop (v1: its middle), "
        "model: as the model's folder says; kept in the checkpoint",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="Of weights and activations; updates are fp32"
    )
    seed: int = Field(0, ge=0, description="Order of the samples, start of LoRA's weights, dropout")
    lora: bool = Field(False, description="Train LoRA adapters instead of the language model's own weights")
    lora_rank: int = Field(128, gt=0, description="Inner size of the adapters")
    lora_alpha: int = Field(256, gt=0, description="The adapters count alpha / rank times")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="Of the adapters' input")
    lora_bits: Literal[16, 4] = Field(
        16,
        description="Bits of the language model's linear layers during LoRA: 4 is QLoRA; the exported model has 16",
    )

    workers: int = run_field(1, gt=0, description="Ray Train workers; one GPU each where there are GPUs")
    min_workers: int | None = run_field(
        None, gt=0, description="Fewest workers to go on with where there is no room for all; none: workers"
    )
    cpus_per_worker: int = run_field(1, gt=0, description="CPU threads per worker")
    gpu: bool = run_field(False, description="Whether each worker takes a GPU")
    zero_stage: Literal[0, 1, 2, 3, "auto"] = run_field(
        2, description="DeepSpeed ZeRO stage; 0 is plain torch, auto the fastest that fits the GPUs"
    )
    deepspeed_config: str | None = run_field(
        None, description="A DeepSpeed JSON for memory and communication, merged over ours"
    )
    offload: bool = run_field(
        False,
        description="Keep fp32 weights, moments and gradients in host memory and run AdamW there: less GPU memory, "
        "slower updates; needs zero_stage 2, 3 or auto",
    )
    checkpointing: Literal["none", "selective", "full", "auto"] = run_field(
        "none",
        description="Activations computed again: none, selective (between matrices), full (whole layers), or auto",
    )
    attention: str = run_field(
        "auto",
        description="Kernel of the attention inside a packed row: auto, varlen (flash; bf16 on CUDA) or sdpa",
    )
    compile: bool = run_field(False, description="Compile the decoder layers with torch.compile")
    fused_loss: bool = run_field(
        False, description="Vocabulary projection and cross-entropy in chunks; torch 2.13 or newer"
    )
    tokens_per_row: PositiveInt | Literal["auto"] = run_field(
        4096, description="Token budget of one packed row, the micro-batch; auto: the fastest that fits"
    )
    eval_every: int = run_field(
        0, ge=0, description="Updates between two looks at the loss on held-out samples; 0: none"
    )
    eval_samples: int = run_field(256, gt=0, description="Held-out samples looked at, the same each time")
    checkpoint_every: int = run_field(200, gt=0, description="Updates between two checkpoints")
    keep_checkpoints: int = run_field(2, gt=0, description="Checkpoints kept while training")
    stop_grace: float = run_field(
        60, gt=0, description="Seconds that SIGTERM or Ctrl-C waits for a last checkpoint"
    )
    spike_factor: float = run_field(
        3.0, gt=1, description="A loss above this many times the running median has its samples named"
    )
    profile: bool = run_field(False, description="Keep a torch profiler trace of a few steps in profile/")
    max_restarts: int = run_field(3, ge=0, description="Times that a lost worker group is started again")

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainSettings":
        if self.template not in NAMES:
            raise ValueError(f"template {self.template!r} is unknown; known: {', '.join(sorted(NAMES))}")
        if self.zero_stage == 0 and self.precision == "bf16":
            raise ValueError(
                "zero_stage 0 keeps no fp32 copy of the weights: set precision=fp32 or zero_stage 1 to 3"
            )
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is above workers {self.workers}")
        if self.lora and find_spec("peft") is None:
            raise ValueError("lora needs peft: pip install 'llava-workflow[lora]', or set lora=false")
        self._refuse_4_bit()
        self._refuse_attention()
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile does not go with zero_stage 3, which swaps weights in a layer: set one back"
            )
        if self.fused_loss:
            from llava.training.memory import can_fuse_loss

            if not can_fuse_loss():
                raise ValueError("fused_loss needs torch 2.13 or newer: upgrade, or set fused_loss=false")
        if self.offload and self.zero_stage in (0, 1):
            raise ValueError(f"offload does not go with zero_stage {self.zero_stage}: set zero_stage 2 or 3")
        if self.deepspeed_config is not None and self.zero_stage == 0:
            raise ValueError(
                "deepspeed_config is given, but zero_stage 0 is plain torch: set zero_stage 1 to 3"
            )
        self.deepspeed()
        return self

    def _refuse_4_bit(self) -> None:
        if self.lora_bits == 16:
            return
        if not self.lora:
            raise ValueError(
                "lora_bits=4 keeps the weights beside adapters in 4 bit: set lora=true, or lora_bits=16"
            )
        if find_spec("bitsandbytes") is None:
            raise ValueError(
                "lora_bits=4 needs bitsandbytes: pip install 'llava-workflow[qlora]', or set lora_bits=16"
            )

    def _refuse_attention(self) -> None:
        if self.attention == AUTO:
            return
        from llava.attention import packing_attention

        try:
            packing_attention(self.attention)
        except RefusedInput as error:
            raise ValueError(str(error)) from None
        if self.attention == "varlen" and not (self.gpu and self.precision == "bf16"):
            raise ValueError(
                "attention varlen needs gpu=true and precision=bf16: set them, or attention=auto"
            )

    def deepspeed(self) -> dict[str, Any]:
        """What DeepSpeed is given; the user's JSON is read on the machine that starts the run."""
        user = read_json(self.deepspeed_config) if self.deepspeed_config is not None else None
        zero_stage: Any = WITHOUT_GPU["zero_stage"] if self.zero_stage == AUTO else self.zero_stage
        return deepspeed_config(
            zero_stage,
            self.gradient_clipping,
            self.precision == "bf16",
            user,
            ("pinned" if self.gpu else "cpu") if self.offload else "no",
        )

    @property
    def offloads(self) -> bool:
        """Whether the optimizer works on the host, by `offload` or by a DeepSpeed JSON."""
        offload = self.deepspeed()["zero_optimization"].get("offload_optimizer") or {}
        return offload.get("device") == "cpu"

    @property
    def layout(self) -> Layout:
        """What was `auto` has been chosen by the time this is asked."""
        values: Any = [getattr(self, name) for name in WITHOUT_GPU]
        if AUTO in values:
            raise RuntimeError("auto was not resolved: see components/training/auto.py")
        return Layout(*values)

    def parts(self, trains: Sequence[str]) -> tuple[str, ...]:
        """What learns (keys of `llava.model.PARTS`) in a stage that trains `trains`."""
        return tuple(trains)

    def own_rates(self) -> dict[str, float]:
        """The peak rate of each part that has one of its own; the rest learns with `learning_rate`."""
        return {"projector": self.projector_learning_rate} if self.projector_learning_rate else {}

    def training(self, parts: Sequence[str]) -> Training:
        """What of the language model learns where `parts` (keys of `llava.model.PARTS`) do."""
        if "language_model" not in parts:
            return "frozen"
        return "lora" if self.lora else "full"

    def adapters(self) -> "Lora":
        """LoRA's shape."""
        from llava.lora import Lora

        return Lora(self.lora_rank, self.lora_alpha, self.lora_dropout)
