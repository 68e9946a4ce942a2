"""The settings of a training stage: what changes the result, and what only says how to run it."""

from typing import Literal

from pydantic import Field, model_validator

from components.contract.component import Settings, run_field
from llava.conversation import TEMPLATES


class TrainSettings(Settings):
    """Both stages; `pretrain` and `finetune` give the defaults."""

    template: str = Field(description="How turns are written; one of the table in llava/conversation.py")
    epochs: float = Field(1.0, gt=0, description="Times that every sample is seen")
    global_batch: int = Field(gt=0, description="Samples per update, over all workers")
    learning_rate: float = Field(gt=0, description="Peak rate, after the warm-up")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the updates with a rising rate")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decay")
    gradient_clipping: float = Field(1.0, ge=0, description="Largest gradient norm; 0 does not clip")
    max_length: int = Field(
        2048, gt=0, description="Tokens per sample, images counted; longer ones are cut once"
    )
    max_lost: float = Field(0.02, ge=0, le=1, description="Share of refused samples over which the run fails")
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="Of weights and activations; updates are fp32"
    )
    seed: int = Field(0, ge=0, description="Order of the samples")

    workers: int = run_field(1, gt=0, description="Ray Train workers; one GPU each where there are GPUs")
    cpus_per_worker: int = run_field(1, gt=0, description="CPU threads per worker")
    gpu: bool = run_field(False, description="Whether each worker takes a GPU")
    zero_stage: Literal[0, 1, 2, 3] = run_field(2, description="DeepSpeed ZeRO stage; 0 is plain torch")
    tokens_per_row: int = run_field(4096, gt=0, description="Token budget of one packed row, the micro-batch")
    checkpoint_every: int = run_field(200, gt=0, description="Updates between two checkpoints")
    keep_checkpoints: int = run_field(2, gt=0, description="Checkpoints kept while training")
    max_restarts: int = run_field(3, ge=0, description="Times that a lost worker group is started again")

    @model_validator(mode="after")
    def _known_template(self) -> "TrainSettings":
        if self.template not in TEMPLATES:
            raise ValueError(f"template {self.template!r} is unknown; known: {', '.join(sorted(TEMPLATES))}")
        if self.zero_stage == 0 and self.precision == "bf16":
            raise ValueError(
                "zero_stage 0 keeps no fp32 copy of the weights: set precision=fp32 or zero_stage 1 to 3"
            )
        return self
