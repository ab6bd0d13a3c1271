"""What a client may ask for: the fields of OpenAI's API that are answered here, within bounds.

Everything that is not named is ignored or, where that would change the meaning of the answer, refused. Bounds keep
every value within what mlx-lm's generation loop expects.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
)

MOST_LOGPROBS = 11
"""mlx-lm's."""


class BadRequest(ValueError):
    """A request that is refused: `status` of HTTP, one sentence, and the field that it is about."""

    def __init__(self, message: str, status: int = 400, field: str | None = None):
        super().__init__(message)
        self.status, self.field = status, field


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Number = Annotated[StrictFloat | StrictInt, AfterValidator(float)]
Penalty = Annotated[Number, Field(ge=-100, le=100, allow_inf_nan=False)]
Window = Annotated[StrictInt, Field(ge=0, le=1 << 20)]
Stop = Annotated[
    list[Annotated[StrictStr, Field(min_length=1, max_length=1000)]],
    BeforeValidator(_listed),
    Field(max_length=16),
]
Absent = Literal[None]


class StreamOptions(BaseModel):
    include_usage: StrictBool = False


class Asked(BaseModel):
    """What completions and chats have in common."""

    model_config = ConfigDict(extra="ignore")

    model: StrictStr | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0, le=100)] | None = None
    repetition_context_size: Window | None = None
    presence_penalty: Penalty | None = None
    presence_context_size: Window | None = None
    frequency_penalty: Penalty | None = None
    frequency_context_size: Window | None = None
    logit_bias: dict[Annotated[int, Field(ge=0)], Penalty] | None = None
    seed: Annotated[StrictInt, Field(ge=0, lt=2**64)] | None = None
    stop: Stop | None = None
    n: Literal[1] | None = None
    draft_model: Absent = None
    adapters: Absent = None

    def body(self, vocab_size: int | None) -> dict[str, Any]:
        """The request as mlx-lm's server reads it; what is not given is left to its defaults."""
        wanted = self.model_dump(exclude_none=True, exclude={"stop", "n", "draft_model", "adapters"})
        if vocab_size:
            if wanted.get("top_k", 0) >= vocab_size:
                wanted["top_k"] = 0
            if outside := [token for token in wanted.get("logit_bias", {}) if token >= vocab_size]:
                raise BadRequest(f"logit_bias: there is no token {outside[0]}", field="logit_bias")
        if wanted.get("logit_bias") == {}:
            del wanted["logit_bias"]
        return wanted


class Completion(Asked):
    prompt: StrictStr
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LOGPROBS)] | StrictBool | None = None

    def body(self, vocab_size: int | None) -> dict[str, Any]:
        wanted = super().body(vocab_size)
        for key in ("echo", "best_of", "suffix", "logprobs"):
            wanted.pop(key, None)
        if self.logprobs is not None and self.logprobs is not False:
            top = 1 if self.logprobs is True else self.logprobs
            wanted |= {"logprobs": True, "top_logprobs": max(1, min(top, (vocab_size or top)))}
        return wanted


class TextPart(BaseModel):
    type: Literal["text"]
    text: StrictStr


class Message(BaseModel):
    role: Annotated[StrictStr, Field(min_length=1, max_length=100)]
    content: StrictStr | list[TextPart] | None = None


class Chat(Asked):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    def body(self, vocab_size: int | None) -> dict[str, Any]:
        wanted = super().body(vocab_size)
        wanted["messages"] = [
            {"role": m.role, "content": m.content if isinstance(m.content, str) else _joined(m.content)}
            for m in self.messages
        ]
        if self.logprobs:
            wanted["top_logprobs"] = max(1, min(self.top_logprobs or 1, vocab_size or MOST_LOGPROBS))
        return wanted


def _joined(parts: list[TextPart] | None) -> str:
    return "".join(part.text for part in parts or [])


def read_request(kind: type[Asked], body: Any) -> Asked:
    """Check the JSON value of a request; raises BadRequest with one sentence."""
    if not isinstance(body, dict):
        raise BadRequest("the request is not a JSON object")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _explained(error) from None


def _explained(error: ValidationError) -> BadRequest:
    errors = error.errors(include_url=False)
    first = next((e for e in errors if e["loc"][0] == "messages" and e["loc"][-1] == "type"), errors[0])
    field = str(first["loc"][0])
    place = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function-", "list[")))
    shown = repr(first["input"])
    shown = shown if len(shown) < 60 else shown[:57] + "..."
    if first["type"] == "missing":
        return BadRequest(f"{place} is missing", field=field)
    if field in ("draft_model", "adapters"):
        return BadRequest(f"{field} is not taken from a client: leave it out", field=field)
    if field == "messages" and first["loc"][-1] == "type":
        return BadRequest(f"{place}: only text is read here, not {shown}", field=field)
    return BadRequest(f"{place} is {shown}: {first['msg'][:1].lower() + first['msg'][1:]}", field=field)
