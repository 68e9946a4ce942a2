"""What the data is expected to hold before it is sharded: for `llava estimate` alone, no result depends on it."""

from pydantic import BaseModel, ConfigDict, Field

from llava.estimate import Corpus


class Expected(BaseModel):
    """Means over the samples of a stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int = Field(gt=0, description="How many there are")
    text_tokens: float = Field(gt=0, description="Tokens of a sample, those of its picture left out")
    supervised_tokens: float = Field(gt=0, description="Tokens of a sample that carry loss")
    images: float = Field(1.0, ge=0, description="Pictures per sample; text-only samples have none")

    def corpus(self, epochs: float) -> Corpus:
        """For the arithmetic."""
        return Corpus(self.samples, self.text_tokens, self.supervised_tokens, self.images, epochs)


class EstimateSettings(BaseModel):
    """One expectation per stage; a stage without any is estimated per step and not in hours."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pretrain: Expected | None = Field(None, description="Of stage 1")
    finetune: Expected | None = Field(None, description="Of stage 2")
