"""From the bytes of a body to what an endpoint works with: parsed, checked, tokenized. Plain functions of time that
grows with the body; `Helpers` decides where they run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from disagg.api.http.errors import ApiError, bad_request
from disagg.api.http.json_pieces import blocks, json_pieces
from disagg.api.request.fields import CHAT, TOKENIZE, parse_params
from disagg.api.request.params import RequestParams
from disagg.api.request.prompts import Encoded, PromptEncoder
from disagg.api.request.sampling import check_together, check_token_ids, check_vocabulary
from disagg.api.settings import ApiSettings
from disagg.api.text.tokenizer import ModelTokenizer

SPENT: Final = ("prompt", "messages", "tokens", "chat_template_kwargs")  # what `Prepared.prompts` was made of


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request to generate. `params` has no prompt any more; `prompts` are empty where no model length was known."""

    params: RequestParams
    prompts: Sequence[Encoded]


class Preparer:
    def __init__(self, settings: ApiSettings, tokenizer: ModelTokenizer) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._encoder = PromptEncoder(tokenizer)

    def generation(self, endpoint: str, body: bytes, max_model_len: int | None) -> Prepared:
        """Raises ApiError for whatever is wrong with the request."""
        params = parse_params(endpoint, parse_json(body))
        self._require_model(params)
        check_together(params)
        check_vocabulary(params, self._tokenizer.vocab_size)
        self._check_choices(params)
        if max_model_len is None:
            return Prepared(without_prompt(params), ())
        encode = self._encoder.chat if endpoint == CHAT else self._encoder.completions
        return Prepared(without_prompt(params), encode(params, max_model_len))

    def text(self, endpoint: str, body: bytes, max_model_len: int | None) -> Iterator[bytes]:
        """The whole answer of `/tokenize` or `/detokenize`, in parts. Raises ApiError before the first."""
        params = parse_params(endpoint, parse_json(body))
        self._require_model(params)
        answer = self._tokenized(params, max_model_len) if endpoint == TOKENIZE else self._detokenized(params)
        return blocks(json_pieces(answer))

    def _tokenized(self, params: RequestParams, max_model_len: int | None) -> dict[str, Any]:
        if (params.prompt is None) == (params.messages is None):
            raise bad_request("send either `prompt` or `messages`", "prompt", code="missing_required_parameter")
        if params.messages is None and len(params.prompt or ()) != 1:
            raise bad_request("`prompt`: expected one string", "prompt")
        encode = self._encoder.completions if params.messages is None else self._encoder.chat
        ((ids, _),) = encode(replace(params, echo=False))
        strings = self._tokenizer.token_strings(ids) if params.return_token_strs else None
        return {"count": len(ids), "max_model_len": max_model_len, "tokens": ids, "token_strs": strings}

    def _detokenized(self, params: RequestParams) -> dict[str, Any]:
        if params.tokens is None:
            raise bad_request("`tokens` is required", "tokens", code="missing_required_parameter")
        check_token_ids(params.tokens, self._tokenizer.vocab_size, "tokens")
        return {"prompt": self._tokenizer.decode(params.tokens, skip_special_tokens=False)}

    def _require_model(self, params: RequestParams) -> None:
        """Raise ApiError 404 unless the request names the served model, or none."""
        served = self._settings.served_model_name
        if params.model not in (None, served):
            message = f"the model `{params.model}` does not exist; this server serves `{served}`"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _check_choices(self, params: RequestParams) -> None:
        num_choices, most = len(params.prompt or "1") * params.n, self._settings.max_choices
        if num_choices > most:
            limit = f"{num_choices} choices were asked for, at most {most} are given per request"
            raise bad_request(limit, "n" if params.n > 1 else "prompt")


def without_prompt(params: RequestParams) -> RequestParams:
    return replace(params, prompt=None, messages=None, tokens=None, chat_template_kwargs={})


def chosen(params: RequestParams) -> dict[str, Any]:
    """What a request chose, without its prompt: plain values."""
    neutral = RequestParams(endpoint=params.endpoint)
    names = [field.name for field in fields(RequestParams) if field.name not in SPENT]
    values = {name: getattr(params, name) for name in names}
    return {name: value for name, value in values.items() if value != getattr(neutral, name) or name == "endpoint"}


def parse_json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except RecursionError:
        raise bad_request("the request body is not usable JSON: it is nested too deeply") from None
    except ValueError as exc:  # also UnicodeDecodeError, and integers of more digits than Python converts
        raise bad_request(f"the request body is not valid JSON: {exc}") from exc
