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


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError("too large a number") from None


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds half of a surrogate pair, which is no character") from None
    return text


def _penalty(value: float) -> float:
    if 0 < value < 0.01:
        raise ValueError("below 0.01 logits overflow; 0 is none")
    return value


Text = Annotated[StrictStr, AfterValidator(_whole)]
Number = Annotated[StrictFloat | StrictInt, AfterValidator(_float)]
Penalty = Annotated[Number, Field(ge=-100, le=100, allow_inf_nan=False)]
Window = Annotated[StrictInt, Field(ge=0, le=1 << 20)]
Stop = Annotated[
    list[Annotated[Text, Field(min_length=1, max_length=1000)]],
    BeforeValidator(_listed),
    Field(max_length=16),
]
Absent = Literal[None]
LEAST = {"temperature": 1e-3, "top_p": 1e-2}
"""Below these the likeliest token is taken: mlx-lm divides by the one, and finds no token at all in the other."""


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
    repetition_penalty: Annotated[Number, Field(ge=0, le=100), AfterValidator(_penalty)] | None = None
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

    def body(self) -> dict[str, Any]:
        """The request as mlx-lm's server reads it; what is not given is left to its defaults."""
        wanted = self.model_dump(exclude_none=True, exclude={"stop", "n", "draft_model", "adapters"})
        if any(wanted.get(key, 1) < least for key, least in LEAST.items()):
            wanted |= {"temperature": 0.0, "top_p": 1.0}
        return wanted


class Completion(Asked):
    prompt: Text
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LOGPROBS)] | StrictBool | None = None

    def body(self) -> dict[str, Any]:
        wanted = super().body()
        for key in ("echo", "best_of", "suffix", "logprobs"):
            wanted.pop(key, None)
        if self.logprobs is not None and self.logprobs is not False:
            _require_whole(self)
            wanted |= {"logprobs": True, "top_logprobs": max(1, int(self.logprobs))}
        return wanted


class TextPart(BaseModel):
    type: Literal["text"]
    text: Text


class TextFormat(BaseModel):
    type: Literal["text"]


class Message(BaseModel):
    role: Annotated[StrictStr, Field(min_length=1, max_length=100)]
    content: Text | list[TextPart] | None = None


class Chat(Asked):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    response_format: TextFormat | None = None

    def body(self) -> dict[str, Any]:
        wanted = super().body()
        for key in ("tools", "response_format"):
            wanted.pop(key, None)
        wanted["messages"] = [
            {"role": m.role, "content": m.content if isinstance(m.content, str) else _joined(m.content)}
            for m in self.messages
        ]
        if self.logprobs:
            _require_whole(self)
            wanted["top_logprobs"] = self.top_logprobs or 1
        elif self.top_logprobs:
            raise BadRequest("top_logprobs is for logprobs: true", field="top_logprobs")
        return wanted


def _require_whole(asked: Asked) -> None:
    if asked.stream:
        raise BadRequest("logprobs: a stream has none here: leave stream out", field="logprobs")


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
    steps = [str(part)[:40] for part in first["loc"] if not str(part).startswith(("function-", "list["))]
    place = ".".join(steps[:4])
    shown = repr(first["input"])
    shown = shown if len(shown) < 60 else shown[:57] + "..."
    if first["type"] == "missing":
        return BadRequest(f"{place} is missing", field=field)
    if field in ("draft_model", "adapters", "tools", "response_format"):
        return BadRequest(f"{field} is not taken from a client: leave it out", field=field)
    if field == "messages" and first["loc"][-1] == "type":
        return BadRequest(f"{place}: only text is read here, not {shown}", field=field)
    return BadRequest(f"{place} is {shown}: {first['msg'][:1].lower() + first['msg'][1:]}", field=field)
