"""The one table of request fields: the parser, `docs/request-fields.md` and the tests all read it.

A field is honoured (it has a check) or refused with 400 naming it (it has none); a name not in the table is refused
too. null means unset. Adding a field is adding a row here and an attribute to `RequestParams`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from disagg.api.http.errors import bad_request
from disagg.api.request.checks import (
    Boolean,
    Check,
    Exactly,
    Integer,
    ListOf,
    Number,
    Object,
    Text,
    UnexpectedValueError,
)
from disagg.api.request.params import RequestParams
from disagg.api.request.request_checks import (
    TOKEN_ID,
    TOKEN_IDS,
    LogitBias,
    Messages,
    Prompts,
    Stops,
    StreamOptions,
    TemplateArguments,
)
from disagg.transceiver.wire.messages.sampling_limits import MAX_LOGPROBS, MAX_PENALTY, MAX_STOP_TOKEN_IDS, MAX_TOKENS

COMPLETIONS: Final = "/v1/completions"
CHAT: Final = "/v1/chat/completions"
TOKENIZE: Final = "/tokenize"
DETOKENIZE: Final = "/detokenize"
GENERATE: Final = (COMPLETIONS, CHAT)
TEXT_TOO: Final = (COMPLETIONS, CHAT, TOKENIZE)
ALL: Final = (COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE)

MAX_N: Final = 128  # OpenAI's limit
MAX_SALT_LENGTH: Final = 512  # it is hashed, so this only bounds a useless field
SEED: Final = Integer(-(2**63), 2**63 - 1)
PRIORITY: Final = Integer(-(2**31), 2**31 - 1)  # what the wire holds
COUNT: Final = Integer(1, MAX_TOKENS)
PENALTY: Final = Number(low=-MAX_PENALTY, high=MAX_PENALTY)


@dataclass(frozen=True, slots=True)
class Field:
    """One row. `effect` says what an honoured field does, or why a refused one is refused."""

    name: str
    endpoints: tuple[str, ...]
    check: Check | None
    effect: str
    default: str = "unset"

    @property
    def is_honoured(self) -> bool:
        return self.check is not None

    @property
    def is_fixed(self) -> bool:
        """Accepted with the one value that describes what the server does anyway, so there is nothing to pass on."""
        return isinstance(self.check, Exactly)

    def read(self, value: Any) -> Any:
        """The value as the server uses it. Raises ApiError 400 naming the field, or the part of it at fault."""
        if self.check is None:
            raise bad_request(f"`{self.name}` is not supported: {self.effect}", self.name, code="unsupported_parameter")
        try:
            return self.check(value)
        except UnexpectedValueError as exc:
            param = self.name + exc.path
            raise bad_request(f"`{param}`: {exc}", param) from exc


def _refused(names: str, why: str, endpoints: tuple[str, ...] = GENERATE) -> tuple[Field, ...]:
    return tuple(Field(name, endpoints, None, why) for name in names.split())


_MODEL_SETS: Final = "the model's generation config, else {}"

FIELDS: Final[tuple[Field, ...]] = (
    Field("model", ALL, Text(max_length=1024), "the served model; another name is 404", "the served model"),
    Field("prompt", (COMPLETIONS, TOKENIZE), Prompts(), "what to continue; several prompts give several choices"),
    Field("messages", (CHAT, TOKENIZE), Messages(), "the conversation, put into text by the model's chat template"),
    Field("tokens", (DETOKENIZE,), TOKEN_IDS, "the token ids to put into text"),
    Field(
        "max_tokens",
        (COMPLETIONS,),
        Integer(0, MAX_TOKENS),
        "most tokens to generate; 0 with `echo` only",
        "16, or what the model's length leaves",
    ),
    Field("max_tokens", (CHAT,), COUNT, "most tokens to generate", "what the model's length leaves"),
    Field("max_completion_tokens", (CHAT,), COUNT, "newer name of `max_tokens`"),
    Field("min_tokens", GENERATE, Integer(0, MAX_TOKENS), "no stop of any kind before so many tokens", "0"),
    Field("n", GENERATE, Integer(1, MAX_N), "choices per prompt; choice i samples with `seed` + i", "1"),
    Field("best_of", (COMPLETIONS,), Integer(1, MAX_N), "accepted if equal to `n`: no choice is thrown away", "`n`"),
    Field("seed", GENERATE, SEED, "the same seed, prompt and parameters give the same tokens", "random"),
    Field("temperature", GENERATE, Number(low=0), "0 is greedy", _MODEL_SETS.format("1")),
    Field("top_p", GENERATE, Number(above=0, high=1), "nucleus sampling; 1 is off", _MODEL_SETS.format("1")),
    Field("top_k", GENERATE, Integer(-1, MAX_TOKENS), "-1 and 0 are off", _MODEL_SETS.format("0")),
    Field("min_p", GENERATE, Number(low=0, high=1), "0 is off", _MODEL_SETS.format("0")),
    Field("repetition_penalty", GENERATE, Number(above=0), "1 is off", _MODEL_SETS.format("1")),
    Field("presence_penalty", GENERATE, PENALTY, "0 is off", "0"),
    Field("frequency_penalty", GENERATE, PENALTY, "0 is off", "0"),
    Field("logit_bias", GENERATE, LogitBias(), "added to the logits of these tokens"),
    Field("stop", GENERATE, Stops(), "texts that end the answer; the answer does not contain them"),
    Field("include_stop_str_in_output", GENERATE, Boolean(), "the answer contains what stopped it", "false"),
    Field("stop_token_ids", GENERATE, ListOf(TOKEN_ID, max_length=MAX_STOP_TOKEN_IDS), "tokens that end the answer"),
    Field("ignore_eos", GENERATE, Boolean(), "the model's own end of text does not end the answer", "false"),
    Field("skip_special_tokens", GENERATE, Boolean(), "special tokens leave no text", "true"),
    Field(
        "logprobs", (COMPLETIONS,), Integer(0, MAX_LOGPROBS), "log-probabilities of the chosen token and so many others"
    ),
    Field("logprobs", (CHAT,), Boolean(), "log-probabilities of the chosen token", "false"),
    Field("top_logprobs", (CHAT,), Integer(0, MAX_LOGPROBS), "and of so many others; needs `logprobs`", "0"),
    Field(
        "prompt_logprobs",
        GENERATE,
        Integer(0, MAX_LOGPROBS),
        "log-probabilities of the prompt's tokens and so many others, with ranks; not with `stream`",
    ),
    Field("return_tokens_as_token_ids", GENERATE, Boolean(), "tokens in logprobs are `token_id:N`", "false"),
    Field("return_token_ids", GENERATE, Boolean(), "adds `prompt_token_ids` and `choices[].token_ids`", "false"),
    Field("stream", GENERATE, Boolean(), "server-sent events, one per step", "false"),
    Field("stream_options", GENERATE, StreamOptions(), "`include_usage`: a last event with the usage; needs `stream`"),
    Field("echo", (COMPLETIONS,), Boolean(), "text and `logprobs` begin with the prompt", "false"),
    Field("add_special_tokens", (COMPLETIONS,), Boolean(), "the tokenizer adds its own, such as BOS", "true"),
    Field(
        "add_special_tokens", (CHAT,), Boolean(), "the tokenizer adds its own; BOS is there once either way", "false"
    ),
    Field("add_special_tokens", (TOKENIZE,), Boolean(), "the tokenizer adds its own", "true; false for `messages`"),
    Field("add_generation_prompt", (CHAT, TOKENIZE), Boolean(), "the template opens the assistant's turn", "true"),
    Field("chat_template_kwargs", (CHAT, TOKENIZE), TemplateArguments(), "variables for the chat template"),
    Field("return_token_strs", (TOKENIZE,), Boolean(), "adds `token_strs`", "false"),
    Field(
        "cache_salt",
        GENERATE,
        Text(max_length=MAX_SALT_LENGTH, min_length=1),
        "KV is shared with requests of this salt only",
    ),
    Field("user", GENERATE, Text(max_length=512), "written to the request's log line"),
    Field("response_format", GENERATE, Exactly({"type": "text"}), "text is what is returned"),
    Field("tool_choice", (CHAT,), Exactly("none"), "no tool is called"),
    Field("modalities", (CHAT,), Exactly(["text"]), "text is what is returned"),
    Field("use_beam_search", GENERATE, Exactly(False), "no beam search", "false"),
    Field("length_penalty", GENERATE, Exactly(1.0), "concerns beam search only", "1.0"),
    Field("spaces_between_special_tokens", GENERATE, Exactly(True), "concerns slow tokenizers only", "true"),
    Field("priority", GENERATE, PRIORITY, "lower ones are served first among the requests of one API key", "0"),
    Field("store", (CHAT,), Exactly(False), "answers are not stored", "false"),
    *_refused("suffix", "the models served here do not fill in the middle", (COMPLETIONS,)),
    *_refused("prompt_embeds", "send the prompt as text or token ids", (COMPLETIONS,)),
    *_refused("echo continue_final_message", "the template closes every message", (CHAT,)),
    *_refused("tools functions function_call parallel_tool_calls web_search_options", "tools are not called", (CHAT,)),
    *_refused("audio prediction moderation", "text in and text out only", (CHAT,)),
    *_refused("documents", "put them into a message", (CHAT,)),
    *_refused("chat_template", "templates come with the model, never with a request", (CHAT, TOKENIZE)),
    *_refused("reasoning_effort verbosity", "use `chat_template_kwargs` if the template knows it", (CHAT,)),
    *_refused("include_reasoning", "reasoning is not told apart from the answer", (CHAT,)),
    *_refused("mm_processor_kwargs media_io_kwargs", "text only", (CHAT,)),
    *_refused("metadata", "nothing is stored with an answer", (CHAT,)),
    *_refused("service_tier", "there is one tier", (CHAT,)),
    *_refused("safety_identifier", "use `user`", (CHAT,)),
    *_refused(
        "prompt_cache_key prompt_cache_options prompt_cache_retention", "caching is not steered by requests", (CHAT,)
    ),
    *_refused("return_prompt_text", "use `return_token_ids` or `/tokenize`", (CHAT,)),
    *_refused(
        "guided_json guided_regex guided_choice guided_grammar guided_decoding_backend guided_whitespace_pattern"
        " structured_outputs structural_tag",
        "answers are not constrained",
    ),
    *_refused("logprob_token_ids", "the likeliest tokens have log-probabilities, and those that were chosen"),
    *_refused("allowed_token_ids bad_words", "use `logit_bias`"),
    *_refused("truncate_prompt_tokens truncation_side", "shorten the prompt before sending it"),
    *_refused("thinking_token_budget repetition_detection watermarking logits_processors", "sampling does not do this"),
    *_refused("kv_transfer_params ec_transfer_params", "the router itself arranges transfers"),
    *_refused("request_id", "send it as the header `X-Request-Id`"),
    *_refused("session_id", "requests are routed one by one"),
    *_refused("stream_interval", "every step is streamed"),
    *_refused("vllm_xargs routed_experts_prompt_start return_token_offsets return_mm_kwargs", "specific to vLLM"),
)

BY_ENDPOINT: Final[dict[str, dict[str, Field]]] = {
    endpoint: {field.name: field for field in FIELDS if endpoint in field.endpoints} for endpoint in ALL
}


def parse_params(endpoint: str, body: Any) -> RequestParams:
    """The honoured fields of a request. Raises ApiError 400 naming the first field that cannot be honoured."""
    try:
        fields = Object()(body)
    except UnexpectedValueError as exc:
        raise bad_request(f"the request body: {exc}") from exc
    table = BY_ENDPOINT[endpoint]
    values = {}
    for name, value in fields.items():
        if name not in table:
            raise bad_request(
                f"`{name[:64]}` is not a field of {endpoint}; remove it", name[:64], code="unknown_parameter"
            )
        if value is None:
            continue
        parsed = table[name].read(value)
        if not table[name].is_fixed:
            values[name] = parsed
    return RequestParams(endpoint=endpoint, **values)
