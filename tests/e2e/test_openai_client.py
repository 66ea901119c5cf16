"""The stock `openai` client against the running system with the bundled model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import openai
import pytest
from support.cluster.system import System, running
from support.faults.wrong import same
from support.model.small_tokenizers import DEMO_FOLDER

pytestmark = pytest.mark.processes

PROMPT = "A file is a sequence of bytes with a name. If the file does not exist,"
CHAT: list[Any] = [
    {"role": "system", "content": "You write about computers."},
    {"role": "user", "content": "What happens when a file does not exist?"},
]
BOS = 2
IDS = {"return_token_ids": True}


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with running("--model", "demo") as system:
        yield system


@pytest.fixture(scope="module")
def client(system: System) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0) as client:
        yield client


# --- what tokens spell, by the tokenizer's file alone ---------------------------------------------------------


def byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, every other byte for the next character from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


@pytest.fixture(scope="module")
def spelling() -> dict[int, bytes]:
    """Bytes by token id; special tokens have none."""
    vocabulary = json.loads((DEMO_FOLDER / "tokenizer.json").read_text())["model"]["vocab"]
    alphabet = byte_of_char()
    return {
        token_id: b"" if token_id < 3 else bytes(alphabet[char] for char in token)
        for token, token_id in vocabulary.items()
    }


def spelled(spelling: dict[int, bytes], token_ids: Sequence[int]) -> str:
    return b"".join(spelling[token_id] for token_id in token_ids).decode(errors="replace")


def bias_to(spelling: dict[int, bytes], text: str) -> dict[str, int]:
    """A bias that leaves nothing but the single bytes of `text` to choose from."""
    token_of_byte = {spelled: token_id for token_id, spelled in spelling.items() if len(spelled) == 1}
    return {str(token_of_byte[bytes([byte])]): 100 for byte in set(text.encode())}


# --- asking ---------------------------------------------------------------------------------------------------


def completion(client: openai.OpenAI, **fields: Any) -> Any:
    return client.completions.create(model="demo", prompt=PROMPT, extra_body=IDS, **fields).choices[0]


def completion_events(client: openai.OpenAI, **fields: Any) -> list[Any]:
    stream = client.completions.create(model="demo", prompt=PROMPT, extra_body=IDS, stream=True, **fields)
    return [event.choices[0] for event in stream]


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(model="demo", messages=CHAT, extra_body=IDS, **fields)


def chat_events(client: openai.OpenAI, **fields: Any) -> list[Any]:
    return list(client.chat.completions.create(model="demo", messages=CHAT, extra_body=IDS, stream=True, **fields))


def joined_ids(events: Sequence[Any]) -> list[int]:
    return [token_id for event in events for token_id in event.token_ids]


# --- tests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 0.8, "seed": 5}, {"temperature": 2, "seed": 6}])
def test_joined_completion_deltas_equal_the_whole_and_what_its_tokens_spell(
    client: openai.OpenAI, spelling: dict[int, bytes], fields: dict[str, Any]
) -> None:
    whole = completion(client, max_tokens=48, **fields)
    events = completion_events(client, max_tokens=48, **fields)
    same("".join(event.text for event in events), spelled(spelling, whole.token_ids))
    same(whole.text, spelled(spelling, whole.token_ids))
    same(joined_ids(events), whole.token_ids)
    assert len(whole.token_ids) == 48 or whole.finish_reason == "stop"
    assert [event.finish_reason for event in events if event.finish_reason] == [whole.finish_reason]
    assert sum(bool(event.text) for event in events) > 10  # it did come in pieces


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 0.8, "seed": 5}])
def test_joined_chat_deltas_equal_the_whole(
    client: openai.OpenAI, spelling: dict[int, bytes], fields: dict[str, Any]
) -> None:
    whole = chat(client, max_tokens=40, **fields).choices[0]
    events = [event.choices[0] for event in chat_events(client, max_tokens=40, **fields)]
    text = "".join(event.delta.content or "" for event in events)
    same(text, spelled(spelling, whole.token_ids))
    same(whole.message.content, spelled(spelling, whole.token_ids))
    assert whole.message.content
    same(joined_ids(events), whole.token_ids)
    assert events[0].delta.role == whole.message.role == "assistant"
    assert events[-1].finish_reason == whole.finish_reason


@pytest.mark.parametrize("characters", ["é", "中", "🦊", "é🦊x"])
def test_characters_of_several_bytes_come_whole(
    client: openai.OpenAI, spelling: dict[int, bytes], characters: str
) -> None:
    """Only the bytes of these characters can be chosen, in whatever order the seed has: valid UTF-8 and not."""
    fields = {"logit_bias": bias_to(spelling, characters), "temperature": 2.5, "max_tokens": 32}
    for seed in (1, 2):
        whole = completion(client, seed=seed, **fields)
        same(whole.text, spelled(spelling, whole.token_ids))
        deltas = [event.text for event in completion_events(client, seed=seed, **fields)]
        assert "".join(deltas) == whole.text
        assert set(b"".join(spelling[token_id] for token_id in whole.token_ids)) <= set(characters.encode())
        text = "".join(e.choices[0].delta.content or "" for e in chat_events(client, seed=seed, **fields))
        assert text == chat(client, seed=seed, **fields).choices[0].message.content


def test_a_character_whose_bytes_were_separate_tokens_is_in_one_delta(
    client: openai.OpenAI, spelling: dict[int, bytes]
) -> None:
    fields = {"logit_bias": bias_to(spelling, "é"), "temperature": 2.5, "max_tokens": 48, "seed": 1}
    deltas = [event.text for event in completion_events(client, **fields)]
    assert sum(delta.count("é") for delta in deltas) == "".join(deltas).count("é") > 0


@pytest.mark.parametrize("seed", [1, 2])
def test_stop_strings_split_over_tokens_end_the_text_before_them(
    client: openai.OpenAI, spelling: dict[int, bytes], seed: int
) -> None:
    fields = {"temperature": 0.8, "seed": seed, "max_tokens": 48}
    whole = completion(client, **fields)
    for stop in stops_over_tokens(spelling, whole.token_ids):
        expected = whole.text[: whole.text.index(stop)]
        stopped = completion(client, stop=[stop, "never in it"], **fields)
        events = completion_events(client, stop=[stop, "never in it"], **fields)
        assert "".join(event.text for event in events) == stopped.text == expected
        assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
        assert (events[-1].finish_reason, events[-1].stop_reason) == ("stop", stop)
    assert completion(client, stop="never in it", **fields).text == whole.text


def stops_over_tokens(spelling: dict[int, bytes], token_ids: Sequence[int]) -> list[str]:
    """The end of one token and the start of the next, three times over; and five tokens less their ends."""
    parts = [spelling[token_id].decode() for token_id in token_ids]
    pairs = [parts[i][-1:] + parts[i + 1][:2] for i in (10, 20, 30)]
    return [*pairs, "".join(parts[14:19])[1:-1]]


def test_a_stop_string_of_several_bytes_split_over_tokens(client: openai.OpenAI, spelling: dict[int, bytes]) -> None:
    """`éé` is four tokens here."""
    fields = {"logit_bias": bias_to(spelling, "é"), "temperature": 2.5, "max_tokens": 32}
    choices = client.completions.create(model="demo", prompt=PROMPT, n=8, seed=1, **fields).choices  # seeds 1 to 8
    seed, text = next((1 + choice.index, choice.text) for choice in choices if choice.text.find("éé") > 0)
    stopped = completion(client, stop="éé", seed=seed, **fields)
    deltas = [event.text for event in completion_events(client, stop="éé", seed=seed, **fields)]
    assert "".join(deltas) == stopped.text == text[: text.index("éé")] != ""
    assert stopped.stop_reason == "éé"


def test_usage_counts_prompt_and_answer(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="demo", prompt=PROMPT, max_tokens=7, temperature=0, extra_body=IDS)
    choice = whole.choices[0]
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(choice.prompt_token_ids)  # type: ignore[attr-defined]
    assert whole.usage.completion_tokens == len(choice.token_ids) == 7  # type: ignore[attr-defined]
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 7
    *others, last = chat_events(client, max_tokens=7, temperature=0, stream_options={"include_usage": True})
    assert [event.usage for event in others] == [None] * len(others)
    assert last.choices == []
    assert last.usage.completion_tokens == sum(len(event.choices[0].token_ids) for event in others) == 7
    assert last.usage == chat(client, max_tokens=7, temperature=0).usage
    assert all(event.usage is None for event in chat_events(client, max_tokens=3))


def test_logprobs_of_the_stream_are_those_of_the_whole(client: openai.OpenAI, spelling: dict[int, bytes]) -> None:
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 10}
    entries = chat(client, logprobs=True, top_logprobs=3, **fields).choices[0].logprobs.content
    assert (
        b"".join(bytes(entry.bytes) for entry in entries).decode() == chat(client, **fields).choices[0].message.content
    )
    for entry in entries:
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert entry.logprob == values[0] < 0  # greedy: the likeliest was chosen
    events = chat_events(client, logprobs=True, top_logprobs=3, **fields)
    streamed = [entry for event in events if event.choices[0].logprobs for entry in event.choices[0].logprobs.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in entries], abs=1e-2)
    choice = completion(client, logprobs=2, **fields)
    assert choice.logprobs.tokens == [spelling[token_id].decode() for token_id in choice.token_ids]
    assert "".join(choice.logprobs.tokens) == choice.text
    assert all(
        max(top.values()) == pytest.approx(chosen)
        for top, chosen in zip(choice.logprobs.top_logprobs, choice.logprobs.token_logprobs, strict=True)
    )


def test_prompts_carry_one_bos(client: openai.OpenAI) -> None:
    answer = chat(client, max_tokens=2)
    assert answer.prompt_token_ids[0] == BOS
    assert answer.prompt_token_ids.count(BOS) == 1
    assert answer.usage.prompt_tokens == len(answer.prompt_token_ids)
    asked_twice = client.chat.completions.create(
        model="demo", messages=CHAT, max_tokens=2, extra_body=IDS | {"add_special_tokens": True}
    )
    assert asked_twice.prompt_token_ids == answer.prompt_token_ids  # type: ignore[attr-defined]
    (event, *_) = chat_events(client, max_tokens=2)
    assert event.prompt_token_ids == answer.prompt_token_ids
    prompt = completion(client, max_tokens=2).prompt_token_ids
    assert (prompt[0], prompt.count(BOS)) == (BOS, 1)


def test_several_choices_stream_side_by_side(client: openai.OpenAI) -> None:
    fields = {"temperature": 1.0, "seed": 11, "max_tokens": 12, "n": 3}
    whole = client.completions.create(model="demo", prompt=[PROMPT, "Once"], **fields)
    texts = dict.fromkeys(range(6), "")
    for event in client.completions.create(model="demo", prompt=[PROMPT, "Once"], stream=True, **fields):
        texts[event.choices[0].index] += event.choices[0].text
    assert [choice.text for choice in whole.choices] == list(texts.values())
    assert len(set(texts.values())) == 6


def test_the_answers_came_through_transfers_and_nothing_is_left(system: System, client: openai.OpenAI) -> None:
    completion(client, max_tokens=4)
    system.settle()
    system.wait_until_idle()
    assert system.total("disagg_transfer_bytes_total", outcome="verified") > 0
    assert system.total("disagg_prompt_tokens_computed_total", worker="decode-0") == 0
