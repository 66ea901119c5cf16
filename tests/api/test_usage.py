"""What a request is said to have cost, with several prompts and several choices of each."""

from __future__ import annotations

import pytest
from support.cluster.fake_backend import answer
from support.cluster.openai_client import Api

from disagg.router.generation import GenerationRequest

pytestmark = pytest.mark.anyio


def scripted_cached(api: Api, cached: dict[str, int]) -> None:
    """Each choice finds so many tokens in the cache, by the end of its request id."""

    def script(request: GenerationRequest) -> list:  # type: ignore[type-arg]
        return answer([20, 21], num_cached_tokens=cached.get(request.request_id[-2:], 0))

    api.backend.script = script


async def usage(api: Api, **body: object) -> dict:  # type: ignore[type-arg]
    reply = await api.post("/v1/completions", {"max_tokens": 2, **body})
    assert reply.status == 200, reply.body
    return reply.json["usage"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("num_prompts", [1, 2, 3])
async def test_each_prompt_of_a_list_counts_once_even_if_they_are_equal(api: Api, n: int, num_prompts: int) -> None:
    single = (await usage(api, prompt="one two three"))["prompt_tokens"]
    several = await usage(api, prompt=["one two three"] * num_prompts, n=n)
    assert several["prompt_tokens"] == num_prompts * single
    assert several["completion_tokens"] == num_prompts * n * 2
    assert several["total_tokens"] == several["prompt_tokens"] + several["completion_tokens"]


async def test_what_a_prompt_found_counts_once_for_all_its_choices(api: Api) -> None:
    scripted_cached(api, {"-0": 5, "-1": 4})
    used = await usage(api, prompt=["a b c d e f", "g h i j k l"], n=2)
    assert used["prompt_tokens_details"]["cached_tokens"] == 5 + 4
