"""The demo's client against a server that answers as the router does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import aiohttp
import pytest
from aiohttp import web
from tokenizers import Tokenizer

from disagg.cli.demo import PROMPT, ask, request_body, transfer_line
from disagg.config.demo import demo_model_folder

RECORD = {
    "prompt_tokens": 271,
    "ttft_s": 0.1234,
    "transfer": {
        "plane": "shm",
        "nbytes": 3 << 20,
        "full_copy_nbytes": 8 << 20,
        "groups": [
            {"name": "full", "num_blocks": 17, "nbytes": 2 << 20},
            {"name": "window-64", "num_blocks": 5, "nbytes": 1 << 20},
        ],
    },
}


def test_the_prompt_is_several_windows_long_and_does_not_end_in_a_space() -> None:
    tokenizer = Tokenizer.from_file(str(demo_model_folder() / "tokenizer.json"))
    assert len(tokenizer.encode(PROMPT).ids) > 4 * 64
    assert not PROMPT.endswith(" ")


def test_the_request_is_sampled_and_seeded() -> None:
    body = request_body("demo")
    assert (body["temperature"], body["top_k"], body["stream"]) == (0.7, 40, True)
    assert isinstance(body["seed"], int)


def test_the_line_says_what_was_moved_and_what_a_full_copy_would_have() -> None:
    assert transfer_line(RECORD) == (
        "271 prompt tokens; moved over shm: full 17 blocks 2 MiB, window-64 5 blocks 1 MiB; "
        "3 MiB in all, a full copy would have moved 8 MiB; time to first token 123 ms"
    )


def test_the_line_says_when_nothing_was_moved() -> None:
    assert "nothing moved" in transfer_line(RECORD | {"transfer": None})


def answer(chunks: Sequence[bytes], status: int = 200) -> int:
    """Run the client against a server that streams `chunks`."""

    async def completions(request: web.Request) -> web.StreamResponse:
        assert request.headers["X-Request-Id"] == "demo"
        response = web.StreamResponse(status=status)
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
        return response

    async def record(request: web.Request) -> web.Response:
        return web.json_response(RECORD)

    async def main() -> int:
        app = web.Application()
        app.router.add_post("/v1/completions", completions)
        app.router.add_get("/requests/demo", record)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            async with aiohttp.ClientSession(headers={"X-Request-Id": "demo"}) as session:
                return await ask(session, {"url": url, "admin": url}, "demo")
        finally:
            await runner.cleanup()

    return asyncio.run(main())


DONE = b"data: [DONE]\n\n"


def text(content: str) -> bytes:
    return b'data: {"choices": [{"text": "' + content.encode() + b'"}]}\n\n'


def test_the_text_is_printed_and_then_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer([text(" one"), text(" t\u00fco"), b'data: {"choices": []}\n\n', DONE]) == 0
    out = capsys.readouterr().out
    assert "does not exist, one t\u00fco\n\n271 prompt tokens;" in out


@pytest.mark.parametrize(
    ("chunks", "status", "words"),
    [
        ([text("a")], 200, r"without \[DONE\]"),
        ([b'data: {"error": {"message": "KV was lost"}}\n\n', DONE], 200, "KV was lost"),
        ([b"busy"], 503, "status 503: busy"),
    ],
)
def test_an_answer_that_is_not_whole_is_an_error(chunks: list[bytes], status: int, words: str) -> None:
    with pytest.raises(aiohttp.ClientError, match=words):
        answer(chunks, status)
