"""The settings of a teacher behind an endpoint that speaks the chat-completions protocol."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from components.contract.component import Settings, run_field
from components.contract.secrets import refuse_secrets


class TeacherSettings(Settings):
    """Which model, how it is asked, what it may cost, and what is accepted of it. Used with teacher=llm only."""

    model: str | None = Field(None, min_length=1, description="The teacher's model, as its endpoint names it")
    temperature: float | None = Field(None, ge=0, le=2, description="Of sampling; null: the endpoint's own")
    max_tokens: int = Field(1024, ge=16, description="Tokens after which an answer is cut (and rejected)")
    language: str = Field("en", pattern=r"^[a-z]{2,3}$", description="Language of the samples, ISO 639")
    max_words: int = Field(400, ge=1, description="Words of an answer over which it is rejected")
    same_question: int = Field(
        200, ge=1, description="Times that nearly the same question is asked, over the whole set, at most"
    )

    base_url: str | None = run_field(None, description="The endpoint, such as http://localhost:8000/v1")
    key_env: str = run_field(
        "OPENAI_API_KEY",
        description="Environment variable that holds the endpoint's key (its name, not the key)",
    )
    key_file: str | None = run_field(
        None, description="File that holds the key, such as a mounted secret; goes before key_env"
    )
    prompts: str | None = run_field(
        None, description="Folder with prompts of your own; null: ours. The contents enter the digest"
    )
    limit_field: Literal["max_tokens", "max_completion_tokens"] = run_field(
        "max_tokens", description="What the endpoint calls max_tokens"
    )
    concurrency: int = run_field(32, ge=1, description="Requests under way at once, over all askers")
    askers: int = run_field(
        1,
        ge=1,
        description="Processes (Ray actors, beside the driver) that ask; the limits hold for all together",
    )
    requests_per_minute: int | None = run_field(
        None, ge=1, description="Requests that leave in any minute at most"
    )
    tokens_per_minute: int | None = run_field(
        None, ge=1, description="Tokens (of prompts and answers) in any minute at most"
    )
    timeout: float = run_field(
        120.0, gt=0, description="Seconds after which a request is given up and tried again"
    )
    patience: float = run_field(
        600.0, gt=0, description="Seconds of tries and pauses that one request is given before the run stops"
    )
    price_prompt: float = run_field(0.0, ge=0, description="Price of a million prompt tokens")
    price_completion: float = run_field(0.0, ge=0, description="Price of a million tokens of answers")
    budget_tokens: int | None = run_field(
        None, ge=1, description="Tokens for this artifact at most (status 3)"
    )
    budget_money: float | None = run_field(
        None, gt=0, description="Money for this artifact at most, in the prices' currency (status 3)"
    )
    max_rejected: float = run_field(
        0.3, ge=0, le=1, description="Share of rejected answers over which the run fails"
    )

    @model_validator(mode="after")
    def _money_has_a_price(self) -> Self:
        if self.budget_money is not None and not (self.price_prompt or self.price_completion):
            raise ValueError("budget_money needs prices: set price_prompt and price_completion")
        if self.base_url is not None:
            refuse_secrets(self.base_url, "instruct.base_url")
            if not self.base_url.startswith(("http://", "https://")):
                raise ValueError(f"base_url {self.base_url!r} is no http:// or https:// address")
        return self
