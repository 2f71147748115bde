"""What the JSON files of a run folder must hold for the report, the comparison, the export and `--resume` to read them. More may be there."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

_Number: TypeAlias = float | None
_Rank: TypeAlias = float | Annotated[dict[str, float], Field(min_length=1)]  # of a client, or of each of its modules


class _Record(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Part(_Record):
    perplexity: _Number
    tokens: int | None = None


class _Losses(_Record):
    losses: list[float] = []


class _Answers(_Record):
    f1: float
    examples: int


class _Sample(_Record):
    prompt: str
    answer: str


class _Evaluation(_Record):
    client_text: _Part | None = None
    held_out_clients: _Part | None = None
    own_text: _Losses | None = None
    own_train: _Losses | None = None
    rouge_l: _Answers | None = None
    samples: list[_Sample] | None = None


class _Diagnostics(_Record):
    row_energy: list[float]
    effective_rank: _Number = None
    merge_error: _Number = None


class _Privacy(_Record):
    epsilon: _Number
    delta: float
    secret: bool


class _Line(_Record):
    """One client in one round."""

    name: str
    rank_before: _Rank
    rank: _Rank
    sequences: int = 0
    weight: _Number = None


class _Drop(_Record):
    name: str
    reason: str


class Round(_Record):
    """A line of rounds.jsonl."""

    round: int = Field(ge=0)
    clients: list[_Line] | None = None
    dropped: list[_Drop] | None = None
    given_up: str | None = None
    secure_rounding: _Number = None
    bytes_down: _Number = None
    bytes_up: _Number = None
    bytes_down_homlora: _Number = None
    bytes_up_homlora: _Number = None
    mean_rank: _Number = None
    seconds: _Number = None
    cpu_seconds: _Number = None
    privacy: _Privacy | None = None
    evaluation: _Evaluation | None = None
    diagnostics: _Diagnostics | Annotated[dict[str, Any], Field(max_length=0)] | None = None  # {} of a merge that keeps no bank


class _Device(_Record):
    rank: int
    seconds: float


class _Client(_Record):
    """One client at the end of a run."""

    name: str
    rank_start: _Rank
    rank_end: _Rank
    sequences: int
    rounds: int
    perplexity_before: _Number = None
    perplexity_after: _Number = None
    device: _Device | None = None


class Summary(_Record):
    """summary.json."""

    clients: list[_Client]
    evaluation_before: _Evaluation | None = None
    evaluation_after: _Evaluation | None = None
    homlora_rank: int | None = None
    best_round: int | None = None
    privacy: _Privacy | None = None
    notes: list[str] | None = None


def fault(kind: type[Round] | type[Summary], value: Any) -> str:
    """What keeps `value` from being a `kind`, in words; '' where nothing does."""
    try:
        kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "it"
        return f"{place}: {first['msg'][:1].lower()}{first['msg'][1:]}, got {first['input']!r:.60}"
    return ""
