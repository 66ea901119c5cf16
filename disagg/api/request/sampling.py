"""From request fields and the model's defaults to `Sampling`; refusals that need several fields or the model."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from hashlib import blake2b
from typing import Final, TypeVar

from disagg.api.http.errors import bad_request
from disagg.api.request.fields import CHAT, COMPLETIONS
from disagg.api.request.params import RequestParams
from disagg.engine.model.checkpoint import GenerationDefaults
from disagg.engine.model.weights import ModelRefused
from disagg.transceiver.wire.messages.values import Sampling

COMPLETIONS_MAX_TOKENS: Final = 16  # OpenAI's default
SEED_MASK: Final = 2**63 - 1  # seeds are non-negative 63-bit numbers below: any integer type holds them

T = TypeVar("T")


def check_together(params: RequestParams) -> None:
    """Fields that contradict each other. Raises ApiError 400 naming one of them."""
    for field in ("messages",) if params.endpoint == CHAT else ("prompt",):
        if getattr(params, field) is None:
            raise bad_request(f"`{field}` is required", field, code="missing_required_parameter")
    if params.best_of not in (None, params.n):
        raise bad_request(
            f"`best_of`: {params.best_of} differs from `n`: {params.n}; only equal is supported", "best_of"
        )
    if params.stream_options is not None and not params.stream:
        raise bad_request("`stream_options` needs `stream`: true", "stream_options")
    if params.top_logprobs and not params.logprobs:
        raise bad_request("`top_logprobs` needs `logprobs`: true", "top_logprobs")
    if params.stream and params.prompt_logprobs is not None:
        raise bad_request("`prompt_logprobs` come with whole answers only; leave `stream` out", "prompt_logprobs")
    if params.answer_limit == 0 and not params.echo:
        raise bad_request("`max_tokens`: 0 asks for no answer; expected at least 1, or `echo`: true", "max_tokens")
    if None not in (params.max_tokens, params.max_completion_tokens) and params.max_tokens != params.answer_limit:
        raise bad_request("`max_tokens` and `max_completion_tokens` differ; send one", "max_tokens")


def check_vocabulary(params: RequestParams, vocab_size: int) -> None:
    """Token ids in fields other than the prompt. Raises ApiError 400."""
    for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", [id_ for id_, _ in params.logit_bias])):
        check_token_ids(ids, vocab_size, name)


def check_token_ids(ids: Iterable[int], vocab_size: int, param: str) -> None:
    if (worst := max(ids, default=0)) >= vocab_size:
        raise bad_request(f"`{param}`: token id {worst} is not in the vocabulary of {vocab_size}", param)


def answer_tokens(params: RequestParams, defaults: GenerationDefaults, prompt_len: int, max_model_len: int) -> int:
    """How many tokens may be generated. Raises ApiError 400 when the model's length has no room for them."""
    check_room(params, prompt_len, max_model_len)
    remaining = max_model_len - prompt_len
    if params.answer_limit is None:
        wanted = COMPLETIONS_MAX_TOKENS if params.endpoint == COMPLETIONS else defaults.max_tokens or remaining
        return min(wanted, remaining)
    return max(1, params.answer_limit)  # what was not asked for is generated and left out


def check_room(params: RequestParams, prompt_len: int, max_model_len: int | None, *, is_least: bool = False) -> None:
    """Raise ApiError 400 when prompt and answer do not fit. `is_least`: the prompt has so many tokens or more."""
    if max_model_len is None:
        return
    has = f"the prompt has {f'more than {prompt_len}' if is_least else prompt_len} tokens"
    if prompt_len >= max_model_len:
        param = "messages" if params.endpoint == CHAT else "prompt"
        raise _too_long(f"{has}, which leaves no room for an answer", max_model_len, param)
    if params.answer_limit is not None and params.answer_limit > max_model_len - prompt_len:
        param = "max_tokens" if params.max_completion_tokens is None else "max_completion_tokens"
        raise _too_long(f"{has} and {params.answer_limit} more were asked for", max_model_len, param)


def _too_long(why: str, max_model_len: int, param: str) -> Exception:
    message = f"{why}; prompt and answer together may have {max_model_len} (the model's max_model_len)"
    return bad_request(message, param, code="context_length_exceeded")


def check_defaults(defaults: GenerationDefaults) -> None:
    """Raise ModelRefused when the model's own sampling defaults are not usable, before any request meets them."""
    try:
        build_sampling(RequestParams(endpoint=COMPLETIONS), defaults, max_tokens=1, seed=0)
    except ValueError as exc:
        raise ModelRefused(f"the model's generation config is not usable: {exc}") from exc


def base_seed(params: RequestParams) -> int:
    """The request's seed, or one drawn for it."""
    return secrets.randbelow(SEED_MASK) if params.seed is None else params.seed


def prefix_salt(tenant: str | None, cache_salt: str | None) -> str:
    """Cached KV is shared by requests of one tenant (its API key) that name the same salt. Reveals neither."""
    if tenant is None and cache_salt is None:
        return ""
    state = blake2b(digest_size=16, person=b"disagg-salt")
    for part in (tenant or "", cache_salt or ""):
        state.update(len(part.encode()).to_bytes(8, "little") + part.encode())
    return state.hexdigest()


def build_sampling(
    params: RequestParams, defaults: GenerationDefaults, *, max_tokens: int, seed: int, tenant: str | None = None
) -> Sampling:
    """The request's values over the model's over neutral ones. Raises ApiError 400."""
    if params.min_tokens > max_tokens:
        raise bad_request(
            f"`min_tokens`: {params.min_tokens} is more than the {max_tokens} tokens allowed", "min_tokens"
        )
    return Sampling(
        max_tokens=max_tokens,
        seed=seed & SEED_MASK,
        temperature=_first(params.temperature, defaults.temperature),
        top_k=max(0, _first(params.top_k, defaults.top_k)),
        top_p=_first(params.top_p, defaults.top_p),
        min_p=_first(params.min_p, defaults.min_p),
        repetition_penalty=_first(params.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        min_tokens=params.min_tokens,
        ignore_eos=params.ignore_eos,
        eos_token_ids=defaults.eos_token_ids,
        stop_token_ids=params.stop_token_ids,
        num_logprobs=params.num_logprobs,
        cache_salt=prefix_salt(tenant, params.cache_salt),
        num_prompt_logprobs=params.num_prompt_logprobs,
        num_choices=params.n,
    )


def _first(value: T | None, default: T) -> T:
    return default if value is None else value
