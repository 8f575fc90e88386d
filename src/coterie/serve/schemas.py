"""What clients may ask for, in the form of OpenAI's API: as tolerant as its clients need, and never deaf.

`null` is as good as nothing. A field that would change the answer and cannot be honoured is refused by name; one that
is not known here is passed over, and the answer's header `X-Coterie-Ignored` names it.
"""

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from coterie.data.examples import Example
from coterie.data.forms import MAX_MESSAGES, Message
from coterie.settings.sampling import MOST_TOP_LOGPROBS

MOST_CHOICES = 128
MOST_STOPS = 16
MOST_PROMPTS = 2048
COMPLETION_TOKENS = 16
"""Longest text completion in tokens where nothing is asked for."""

REFUSED = {
    "another form of answers": (
        "audio", "grammar", "guided_choice", "guided_decoding_backend", "guided_grammar", "guided_json", "guided_regex",
        "json_schema", "structural_tag", "structured_outputs",
    ),
    "another prompt": (
        "chat_template", "chat_template_kwargs", "continue_final_message", "documents", "prompt_embeds", "suffix",
        "web_search_options",
    ),
    "another way to choose tokens": (
        "allowed_token_ids", "bad_words", "dry_multiplier", "ignore_eos", "length_penalty", "logits_processors",
        "min_tokens", "mirostat", "mirostat_mode", "prediction", "stop_token_ids", "tfs", "typical_p",
        "use_beam_search", "xtc_probability",
    ),
    "what is not shown here": ("prompt_logprobs", "return_token_ids", "moderation"),
}  # fmt: skip
"""Fields of OpenAI, vLLM and llama.cpp that would change the answer, by what they ask for."""
_REFUSED = {name: what for what, names in REFUSED.items() for name in names}
UNFORCED = (None, "auto", "none")
"""Choices of tools that leave it to the model, which then answers in text."""


def wrong(param: str, why: str) -> PydanticCustomError:
    """Build the error for a field that is wrong beside others."""
    return PydanticCustomError("invalid_value", "{why}", {"why": why, "param": param})


def _whole_characters(text: str) -> str:
    """Refuse halves of characters, which JSON can write and no tokenizer can read."""
    if re.search("[\ud800-\udfff]", text):
        raise ValueError("it holds half of a surrogate pair, which is no character")
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def one_or_more(given: object) -> object:
    """Write a prompt as a list of texts, or of lists of tokens."""
    is_tokens = isinstance(given, list) and given and all(type(one) is int for one in given)
    return [given] if isinstance(given, str) or is_tokens else given


Prompts = Annotated[
    list[Text] | list[Annotated[list[TokenId], Field(min_length=1)]],
    BeforeValidator(one_or_more, json_schema_input_type=str | list[str] | list[TokenId] | list[list[TokenId]]),
    Field(min_length=1, max_length=MOST_PROMPTS),
]
"""One prompt or several, each a text or a list of tokens."""
Stops = Annotated[
    list[Annotated[Text, Field(min_length=1)]],
    BeforeValidator(lambda given: [given] if isinstance(given, str) else given, json_schema_input_type=str | list[str]),
    Field(max_length=MOST_STOPS),
]


class Body(BaseModel):
    """A request's body, or an object in it."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_nothing(cls, values: object) -> object:
        """Take the default for `null`, where that is not a value of its own."""
        if not isinstance(values, Mapping):
            return values
        fields = cls.model_fields
        nulls = {name for name, field in fields.items() if type(None) in get_args(field.annotation)}
        return {name: value for name, value in values.items() if value is not None or name in nulls}


class ContentPart(Body):
    """A piece of a message."""

    type: str
    text: Text | None = None
    refusal: Text | None = None

    @model_validator(mode="after")
    def _is_text(self) -> "ContentPart":
        if self.type not in ("text", "refusal", "input_text", "output_text"):
            raise ValueError(f"parts of type {self.type[:40]!r} are not read; give parts of type text")
        if self.text is None and self.refusal is None:
            raise ValueError("a part of a message needs a text")
        return self


class ChatMessage(Body):
    """One turn of a conversation; what else a client keeps in it is passed over."""

    role: Annotated[Text, Field(min_length=1, max_length=64)]
    content: Text | list[ContentPart] | None = None

    @property
    def text(self) -> str:
        """What the turn says: the texts of its parts are parted by line ends."""
        if isinstance(self.content, list):
            return "\n".join(part.text or part.refusal or "" for part in self.content)
        return self.content or ""

    @property
    def speaker(self) -> str:
        """The role as chat templates know it."""
        return "system" if self.role == "developer" else self.role


def asks_something(field: str) -> AfterValidator:
    """Refuse a conversation in a field that leaves nothing to answer."""

    def check(messages: list[ChatMessage]) -> list[ChatMessage]:
        if not any(message.role == "user" for message in messages):
            raise wrong(field, f"{field} has no question: give a message of the role user")
        if messages[-1].role == "assistant":
            raise wrong(field, f"{field} ends with an answer of the assistant; end with what it is to answer")
        return messages

    return AfterValidator(check)


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES), asks_something("messages")]


def conversation(messages: Sequence[ChatMessage]) -> Example:
    """Return a conversation that a model is to answer."""
    return Example("", tuple(Message(turn.speaker, turn.text) for turn in messages))


class CoterieField(Body):
    """What only this server knows: how the experts of this request are chosen, weighed and put together."""

    model_config = ConfigDict(extra="forbid")

    router: str | None = Field(None, description="another router: uniform, an expert's name, or a router's")
    combiner: str | None = Field(None, description="another combiner: where experts meet")
    weights: dict[str, Share] | None = Field(None, description="the experts' weights, in place of a router's")
    top_k: int | None = Field(None, ge=1, description="keep only the K experts with the largest weights")
    every: int | Literal["inf"] | None = Field(None, description="weigh again at every N-th token, or never (inf)")
    detail: bool = Field(False, description="tell the weights with the answer")

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> "CoterieField":
        if self.every is not None and self.every != "inf" and self.every < 1:
            raise wrong("coterie.every", "every counts tokens, so it is 1 or more, or inf")
        if self.weights is not None and not any(self.weights.values()):
            raise wrong("coterie.weights", "weights need an expert with a weight above 0")
        if self.weights is not None and (self.router is not None or self.every not in (None, "inf")):
            raise wrong("coterie.weights", "weights take the place of a router; give weights, or router and every")
        return self


class AdapterScale(Body):
    """An expert with its weight, as llama.cpp's server takes them."""

    id: int | str
    scale: Share = 1.0


class StreamOptions(Body):
    """What a stream tells besides its text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class AnswerRequest(Body):
    """What chats, responses and completions have in common."""

    model: Annotated[Text, Field(min_length=1)]
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, description="keep only the K likeliest tokens; 0 or -1: all")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] = {}
    stop: Stops = []
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    coterie: CoterieField = CoterieField()
    lora: list[AdapterScale] | None = None

    @model_validator(mode="after")
    def _can_be_honoured(self) -> "AnswerRequest":
        for name, value in (self.model_extra or {}).items():
            if value and name in _REFUSED:
                raise wrong(name, f"{name} asks for {_REFUSED[name]}, which this server cannot honour; leave it out")
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options", "stream_options is only for streams; set stream to true, or leave it out")
        if self.lora is not None and self.coterie.weights is not None:
            raise wrong("lora", "lora and coterie.weights are the same thing; give one of them")
        return self

    @property
    def limit(self) -> int | None:
        """The most tokens of an answer; None for as many as fit."""
        raise NotImplementedError

    @property
    def alternatives(self) -> int | None:
        """How many alternatives are shown beside each token; None for no log-probabilities at all."""
        raise NotImplementedError

    @property
    def prompt_alternatives(self) -> int | None:
        """The same for the tokens of the prompt."""
        return None

    def sampling(self) -> dict[str, Any]:
        """Return the fields of `SamplingSettings`; without a seed, one that nobody has had."""
        penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        same = {name: getattr(self, name) for name in ("temperature", "top_p", "min_p", "stop", *penalties)}
        biases = [f"{token}={bias:.17f}" for token, bias in self.logit_bias.items()]
        seed = secrets.randbits(32) if self.seed is None else self.seed % 2**63
        rest = {"top_k": max(0, self.top_k), "logit_bias": biases, "seed": seed}
        return same | rest | {"top_logprobs": self.alternatives or 0}

    def ignored(self) -> list[str]:
        """Return the first names of what was given and does not act, with dots inside, fit for a header."""
        return sorted({re.sub(r"[^\w.-]", "?", name, flags=re.ASCII)[:64] for name in _unknown(self)})[:32]


def _unknown(body: Body, place: str = "") -> Iterator[str]:
    for name, value in (body.model_extra or {}).items():
        if value:
            yield place + name
    for name in type(body).model_fields:
        found = getattr(body, name)
        for inner in found if isinstance(found, list) else [found]:
            if isinstance(inner, Body):
                yield from _unknown(inner, f"{place}{name}.")


class ChatRequest(AnswerRequest):
    """What `/v1/chat/completions` takes."""

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_TOP_LOGPROBS)
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None

    @property
    def limit(self) -> int | None:
        """The most tokens of an answer; None for as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """How many alternatives are shown beside each token; None for no log-probabilities at all."""
        return self.top_logprobs if self.logprobs else None

    def ignored(self) -> list[str]:
        """Return the names of what was given and does not act."""
        tools = [name for name in ("tools", "functions") if getattr(self, name)]
        return sorted([*super().ignored(), *tools])

    @model_validator(mode="after")
    def _promises_text(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise wrong("top_logprobs", "top_logprobs needs logprobs to be true")
        check_unforced("tool_choice", self.tool_choice)
        check_unforced("function_call", self.function_call)
        if set(self.modalities or ()) - {"text"}:
            raise wrong("modalities", "modalities: answers are text here; leave it out")
        check_format("response_format", self.response_format)
        return self


def check_unforced(field: str, choice: Any) -> None:
    """Refuse a choice of tools that demands a call."""
    forced = choice.get("allowed_tools", choice).get("mode") != "auto" if isinstance(choice, dict) else True
    if choice not in UNFORCED and forced:
        raise wrong(field, f"{field} demands a call of a tool, but answers are text here; use auto or none")


def check_format(field: str, given: Mapping[str, Any] | None) -> None:
    """Refuse a form of answers that cannot be promised."""
    kind = None if given is None else given.get("type")
    if given is None or kind == "text":
        return
    if kind in ("json_object", "json_schema"):
        raise wrong(field, f"{field} {kind} cannot be promised here; ask for it in words, and check the answer")
    raise wrong(field, f"{field} has the unknown type {str(kind)[:40]!r}; use text")


class CompletionRequest(AnswerRequest):
    """What `/v1/completions` takes: texts or tokens that are continued as they stand."""

    prompt: Prompts
    max_tokens: int | None = Field(COMPLETION_TOKENS, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    echo: bool = False
    best_of: int | None = Field(None, ge=1, le=MOST_CHOICES)

    @property
    def limit(self) -> int | None:
        """The most tokens of an answer; None for as many as fit."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many alternatives are shown beside each token; None for no log-probabilities at all."""
        return self.logprobs

    @property
    def prompt_alternatives(self) -> int | None:
        """The same for the tokens of the prompt, which are told where it is given back."""
        return self.logprobs if self.echo else None

    @model_validator(mode="after")
    def _is_a_text(self) -> "CompletionRequest":
        if any(isinstance(prompt, str) and not prompt for prompt in self.prompt):
            raise wrong("prompt", "prompt is empty; give some text")
        if self.best_of not in (None, self.n):
            raise wrong("best_of", "best_of other than n is not supported; leave it out")
        if len(self.prompt) * self.n > MOST_PROMPTS:
            raise wrong("n", f"n: {len(self.prompt)} prompts of {self.n} answers are more than {MOST_PROMPTS}")
        if self.max_tokens == 0 and not self.echo:
            raise wrong("max_tokens", "max_tokens 0 writes nothing; only with echo does that answer something")
        return self
