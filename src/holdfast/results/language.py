"""What results hold about language models beside their skill."""

from __future__ import annotations

from pydantic import Field

from holdfast.results.reason_codes import Role
from holdfast.results.tables import ResultModel


class LanguageScale(ResultModel):
    """What turns the scores of a next-token task into nats and perplexity, and its samples into tokens."""

    unigram_nll: float = Field(description="Negative log-likelihood a token of the unigram model, in nats: skill 0.")
    tokens_per_sample: float = Field(description="Tokens that count in one of the adversary's samples, on average.")

    def nll(self, skill: float) -> float:
        """Returns the negative log-likelihood a token, in nats, of a skill."""
        return (1 - skill) * self.unigram_nll


class WrittenText(ResultModel):
    """How a language model continues the beginning of a test row of the restricted task."""

    role: Role
    adversary: str | None = Field(description="The attack after which it wrote; None: before any attack.")
    row: int = Field(0, description="Number of the test row, from 0 on.")
    prompt: str
    text: str


class MeasuredScore(ResultModel):
    """A further measure of what a language model can do, such as a task of lm-evaluation-harness."""

    role: Role
    adversary: str | None = Field(description="The attack after which it was measured; None: before any attack.")
    measure: str = Field(description="Name of the task.")
    metric: str
    score: float | None = Field(description="None: not finite.")
