from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.links.sample_messages import HEADER, SAMPLES, SAMPLING
from support.links.unchecked import raw

from disagg.transceiver.wire import codec
from disagg.transceiver.wire.codec import PROTOCOL, TAGS, decode, encode
from disagg.transceiver.wire.errors import LocalProtocolError, RemoteProtocolError
from disagg.transceiver.wire.messages.digests import GroupDigests
from disagg.transceiver.wire.messages.peer import Accepted, Ack, Closed, Done, PeerMessage, Received
from disagg.transceiver.wire.messages.router import Dispatch, RouterMessage
from disagg.transceiver.wire.messages.tokens import StepTokens, Tokens
from disagg.transceiver.wire.messages.values import FirstToken, Sampling, SamplingState, TokenLogprobs
from disagg.transceiver.wire.schema import shape_of
from disagg.transceiver.wire.sizes import MAX_MANIFEST_ENTRIES, MAX_MESSAGE_NBYTES

GOLDEN = dict(line.split() for line in (Path(__file__).parent / "golden_messages.txt").read_text().splitlines())


def packed(tag: int, fields: object, version: tuple[int, int] = PROTOCOL) -> bytes:
    return msgpack.packb([*version, tag, fields])


def fields_of(message: object) -> dict[str, object]:
    return msgpack.unpackb(encode(message))[3]


def test_every_message_has_a_tag_a_sample_and_golden_bytes() -> None:
    members = set(RouterMessage.__args__)
    for member in PeerMessage.__args__:
        members.add(member)
    assert set(TAGS.values()) == members == {type(sample) for sample in SAMPLES}
    assert set(GOLDEN) == {kind.__name__ for kind in members}


@pytest.mark.parametrize("message", SAMPLES, ids=lambda m: type(m).__name__)
def test_golden_bytes_do_not_change(message: object) -> None:
    assert encode(message).hex() == GOLDEN[type(message).__name__]
    assert decode(bytes.fromhex(GOLDEN[type(message).__name__])) == message


@pytest.mark.parametrize("message", SAMPLES, ids=lambda m: type(m).__name__)
def test_memoryviews_are_decoded_like_bytes(message: object) -> None:
    assert decode(memoryview(encode(message))) == message


def test_unknown_fields_of_a_later_minor_version_are_ignored() -> None:
    fields = fields_of(Ack(HEADER)) | {"later": [1, 2]}
    assert decode(packed(11, fields, (PROTOCOL[0], PROTOCOL[1] + 9))) == Ack(HEADER)


def test_another_major_version_is_refused_naming_both() -> None:
    with pytest.raises(RemoteProtocolError, match=r"protocol 3\.5, this process 2\.1"):
        decode(packed(11, fields_of(Ack(HEADER)), (3, 5)))


def test_a_missing_field_takes_its_default() -> None:
    step = StepTokens.of([Tokens("t", 0, 0, (1,))])
    fields = fields_of(step)
    del fields["logprobs"]
    assert decode(packed(37, fields)) == step


TWO_ROWS = StepTokens.of(
    [
        Tokens("t", 0, 0, (1, 2), (TokenLogprobs(-1.0, ((1, -1.0), (2, -2.0))), TokenLogprobs(-0.5, ())), choice=1),
        Tokens("u", 3, 5, (7,)),
    ]
)


@pytest.mark.parametrize(
    ("column", "named"),
    [
        ("transfer_ids", "epochs: 2, expected one for each of"),
        ("epochs", "epochs: "),
        ("indexes", "indexes: "),
        ("nums_cached", "nums_cached: "),
        ("counts", "counts: "),
        ("choices", "choices: "),
        ("token_ids", "counts: 3, expected"),
        ("num_tops", "num_tops: "),
        ("top_ids", "top_ids, logprobs: "),
        ("logprobs", "top_ids, logprobs: "),
    ],
)
def test_a_column_that_is_shorter_or_longer_than_the_others_is_refused_by_name(column: str, named: str) -> None:
    values = getattr(TWO_ROWS, column)
    for other in (values[:-1], (*values, values[-1])):
        with pytest.raises(ValueError, match=f"^{re.escape(named)}"):
            replace(TWO_ROWS, **{column: other})
    fields = fields_of(TWO_ROWS)
    cut = fields[column][: -len(fields[column]) // len(values)]  # type: ignore[index, arg-type]
    with pytest.raises(RemoteProtocolError, match=re.escape(named)):
        decode(packed(37, fields | {column: cut}))


def test_a_missing_field_without_default_is_named() -> None:
    fields = fields_of(Accepted(HEADER, 1))
    del fields["queue_position"]
    with pytest.raises(RemoteProtocolError, match=r"Accepted\.queue_position: missing"):
        decode(packed(5, fields))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"number": True}, "Received.number: bool, expected int"),
        ({"number": "1"}, "Received.number: str, expected int"),
        ({"number": 1.0}, "Received.number: float, expected int"),
        ({"header": [1]}, "Received.header: list, expected map"),
        ({"header": None}, "Received.header: NoneType, expected map"),
    ],
)
def test_a_field_of_another_type_is_refused_by_its_path(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        decode(packed(7, fields_of(Received(HEADER, 1)) | change))
    assert complaint in str(caught.value)


def test_values_are_validated_by_their_own_classes() -> None:
    fields = fields_of(Dispatch("t", 0, "r", "serve", (1,), SAMPLING, 1.0))
    fields["sampling"]["temperature"] = -1.0
    with pytest.raises(RemoteProtocolError, match=r"temperature: -1\.0, expected 0 or more"):
        decode(packed(36, fields))


@pytest.mark.parametrize(
    ("field", "wrong", "least"),
    [
        ("max_tokens", 0, 1),
        ("temperature", float("nan"), 0.0),
        ("top_p", 0.0, 1.0),
        ("top_p", 1.5, 0.1),
        ("min_p", -0.1, 0.0),
        ("min_p", 1.1, 1.0),
        ("top_k", -1, 0),
        ("repetition_penalty", 0.0, 5e-324),
        ("repetition_penalty", float("inf"), 1.7e308),
        ("temperature", float("inf"), 1.7e308),
        ("presence_penalty", float("nan"), -2.0),
        ("frequency_penalty", float("-inf"), 2.0),
        ("top_k", 2**63, 2**63 - 1),
        ("seed", 2**64, 2**64 - 1),
        ("seed", -(2**63) - 1, -(2**63)),
        ("min_tokens", -1, 0),
        ("num_logprobs", 21, 20),
        ("logit_bias", ((1, float("inf")),), ((1, 100.0),)),
        ("logit_bias", ((2**63, 1.0),), ((2**63 - 1, 1.0),)),
        ("logit_bias", ((1, 1.0),) * 1025, ((1, 1.0),) * 1024),
        ("stop_token_ids", (2**63,), (2**63 - 1,)),
        ("eos_token_ids", (1,) * 257, (1,) * 256),
    ],
)
def test_sampling_that_no_sampler_could_follow_is_named(field: str, wrong: object, least: object) -> None:
    """The engine divides by these and indexes with them: a worker must not be sent what its sampler cannot take."""
    assert getattr(replace(SAMPLING, **{field: least}), field) == least
    with pytest.raises(ValueError, match=f"^{field}: "):
        replace(SAMPLING, **{field: wrong})


@pytest.mark.parametrize(
    ("value", "change"),
    [
        (SamplingState(0), {"seed": 2**64}),
        (SamplingState(0), {"output_counts": ((1, 0),)}),
        (SamplingState(0), {"output_counts": ((-1, 1),)}),
        (SamplingState(0), {"version": 0}),
        (FirstToken(1, None, SamplingState(0)), {"token_id": -1}),
        (FirstToken(1, None, SamplingState(0)), {"num_cached_tokens": -1}),
    ],
)
def test_a_first_token_that_no_prefill_worker_samples_is_named(
    value: SamplingState | FirstToken, change: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(change))}"):
        replace(value, **change)  # type: ignore[arg-type]


def test_a_message_with_such_values_is_the_peers_fault() -> None:
    fields = fields_of(Dispatch("t", 0, "r", "serve", (1,), SAMPLING, 1.0))
    fields["sampling"]["repetition_penalty"] = float("inf")
    with pytest.raises(RemoteProtocolError, match="repetition_penalty: inf, expected more than 0 and finite"):
        decode(packed(36, fields))


@pytest.mark.parametrize("deadline", [0.0, -1.0, float("inf"), float("nan")])
def test_a_dispatch_needs_a_finite_deadline(deadline: float) -> None:
    with pytest.raises(ValueError, match="deadline_s"):
        Dispatch("t", 0, "r", "serve", (1,), SAMPLING, deadline)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        packed(255, {}),
        msgpack.packb([1, 0, 11]),
        msgpack.packb({1: 2}),
        packed(11, [1]),
        b"\x91" * 2000,
        msgpack.packb([True, 0, 11, {}]),
        packed(11, {}) + b"x",
        b"\xd6\xff\x00",
    ],
)
def test_bytes_that_are_no_message_raise_the_remote_error(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(data)


def test_a_message_above_the_cap_is_refused_on_both_sides() -> None:
    with pytest.raises(RemoteProtocolError, match="at most"):
        decode(bytes(MAX_MESSAGE_NBYTES + 1))
    with pytest.raises(LocalProtocolError, match="at most"):
        encode(raw(Done, HEADER, 0, 1, 1, (), None, bytes(MAX_MESSAGE_NBYTES)))


def test_the_longest_prompt_and_its_manifest_fit_the_cap() -> None:
    dispatch = Dispatch("t" * 32, 0, "r" * 64, "decode", (2**31 - 1,) * 2**20, SAMPLING, 600.0)
    assert len(encode(dispatch)) <= MAX_MESSAGE_NBYTES
    assert MAX_MANIFEST_ENTRIES > 2**16


def test_a_prompt_is_packed_as_int32_and_comes_back_as_it_was() -> None:
    prompt = (0, 1, 2**31 - 1, -(2**31))
    dispatch = Dispatch("t" * 32, 0, "r", "serve", prompt, SAMPLING, 600.0)
    assert fields_of(dispatch)["prompt"] == b"".join(token.to_bytes(4, "little", signed=True) for token in prompt)
    assert decode(encode(dispatch)) == dispatch


@pytest.mark.parametrize("prompt", [(2**31,), (1.5,), ("1",), [1]], ids=str)
def test_a_prompt_that_is_no_tuple_of_int32_is_not_sent(prompt: object) -> None:
    with pytest.raises(LocalProtocolError, match=r"Dispatch\.prompt"):
        encode(Dispatch("t" * 32, 0, "r", "serve", prompt, SAMPLING, 600.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [b"\0" * 5, [1], "text", None], ids=str)
def test_a_prompt_of_other_bytes_is_refused(data: object) -> None:
    fields = fields_of(Dispatch("t" * 32, 0, "r", "serve", (1,), SAMPLING, 600.0)) | {"prompt": data}
    with pytest.raises(RemoteProtocolError, match=r"Dispatch\.prompt"):
        decode(packed(36, fields))


def test_a_manifest_of_as_many_units_as_are_admitted_comes_back_and_one_more_does_not() -> None:
    units = range(2**24 - MAX_MANIFEST_ENTRIES, 2**24)
    top = tuple((2**31 - 1, -1.5) for _ in range(50))
    first = FirstToken(2**31 - 1, TokenLogprobs(-1.5, top), SamplingState(2**63, ((1, 1),)), 2**20)
    largest = GroupDigests.of(255, (2**16, 2**16, 2**16, 2**16), dict.fromkeys(units, 2**64 - 1))
    done = Done(HEADER, 0, 1, 2**20, (largest,), first, bytes(32))
    assert decode(encode(done)) == done
    one = GroupDigests.of(0, (0, 1, 0, 1), {0: 1})
    with pytest.raises(RemoteProtocolError, match=f"Done: .*{MAX_MANIFEST_ENTRIES + 1}"):
        decode(encode(raw(Done, HEADER, 0, 1, 1, (one, largest), None, bytes(32))))


@pytest.mark.parametrize(
    ("ordinals", "digests", "fault"),
    [
        (b"", b"", "ordinals"),
        (b"\1\0\0\0\0", b"", "digests"),
        (b"\1\0\0\0", bytes(7), "digests"),
        (b"\1\0\0\0", bytes(16), "digests"),
        (b"\1\0\0\0" * 2, bytes(16), "ordinals"),
        (b"\2\0\0\0\1\0\0\0", bytes(16), "ordinals"),
        (b"\0\0\0\1", bytes(8), "ordinals"),
    ],
)
def test_columns_of_digests_are_ascending_ordinals_and_as_many_digests(
    ordinals: bytes, digests: bytes, fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        GroupDigests(0, (0, 1, 0, 1), ordinals, digests)


def test_digests_keep_their_ordinals() -> None:
    entry = GroupDigests.of(3, (0, 1, 0, 1), {7: 1, 2: 2**64 - 1})
    assert entry.by_ordinal() == {2: 2**64 - 1, 7: 1}
    assert (entry.ordinals, entry.num_units) == (b"\2\0\0\0\7\0\0\0", 2)


@pytest.mark.parametrize("groups", [(1, 0), (1, 1)])
def test_a_manifest_names_its_groups_in_order(groups: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="ascending groups"):
        Done(HEADER, 0, 1, 1, tuple(GroupDigests.of(group, (0, 1, 0, 1), {0: 1}) for group in groups), None, b"")


@pytest.mark.parametrize(
    "message",
    [
        "text",
        Received(HEADER, True),
        raw(Received, HEADER, 2**70),
        raw(Received, HEADER, "1"),
        Tokens("t", 0, 0, (1,)),
        raw(StepTokens, ("t",), (0,), (0,), (0,), (1,), [1]),
        raw(StepTokens, ("t",), (0,), (0,), (0,), (1,), (2**31,)),
        raw(StepTokens, ("t",), (0,), (0,), (0,), (1,), (1,), logprobs=(None,)),
        StepTokens.of([Tokens("\ud800", 0, 0, ())]),
        Closed(None),
        Dispatch("t", 0, "r", "serve", (1,), Sampling(max_tokens=1, logit_bias=((1,),)), 1.0),
        Dispatch("t", 0, "r", "serve", (1,), Sampling(max_tokens=1, temperature=True), 1.0),
    ],
)
def test_what_this_process_may_not_say_raises_the_local_error(message: object) -> None:
    with pytest.raises(LocalProtocolError):
        encode(message)


def test_a_type_without_wire_shape_is_a_programming_error() -> None:
    with pytest.raises(TypeError, match="no wire shape"):
        shape_of(dict[str, int])


def test_whole_numbers_are_floats_where_floats_are_declared() -> None:
    sampling = decode(encode(Dispatch("t", 0, "r", "serve", (1,), Sampling(max_tokens=1, temperature=1), 2))).sampling
    assert type(sampling.temperature) is float


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_decode_or_raise_the_remote_error(data: bytes) -> None:
    decode_or_refuse(data)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SAMPLES), st.data())
def test_damaged_messages_decode_or_raise_the_remote_error(message: object, data: st.DataObject) -> None:
    raw = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    decode_or_refuse(bytes(raw[: data.draw(st.integers(0, len(raw)))]))


_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SAMPLES), st.data())
def test_messages_with_any_value_anywhere_decode_or_raise(message: object, data: st.DataObject) -> None:
    fields = fields_of(message)
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(_values)
    decode_or_refuse(packed(msgpack.unpackb(encode(message))[2], fields))


def decode_or_refuse(data: bytes) -> None:
    try:
        message = decode(data)
    except RemoteProtocolError:
        return
    assert type(message) in TAGS.values()
    assert type(decode(encode(message))) is type(message)


def test_running_out_of_memory_on_a_message_is_the_peers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(data: bytes, **_limits: object) -> None:
        raise MemoryError

    monkeypatch.setattr(codec.msgpack, "unpackb", exhausted)
    with pytest.raises(RemoteProtocolError, match="MemoryError"):
        decode(packed(11, {}))
