from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.links.sample_messages import FIRST, GEOMETRY, HEADER
from support.links.unchecked import changed

from disagg.transceiver.layout.cut import whole_group
from disagg.transceiver.protocol.manifest import is_sealed, seal
from disagg.transceiver.wire.codec import decode, encode
from disagg.transceiver.wire.messages.digests import GroupDigests
from disagg.transceiver.wire.messages.peer import Done
from disagg.transceiver.wire.messages.values import SamplingState, TokenLogprobs

KEY = bytes(range(32))
ENTRIES = (GroupDigests.of(0, (0, 1, 0, 2), {3: 11}), GroupDigests.of(1, (0, 3, 0, 2), {3: 12, 4: 13}))
DONE = seal(KEY, HEADER, rank=0, num_ranks=1, num_slices=2, manifest=ENTRIES, first_token=FIRST)


def test_a_sealed_done_holds_on_both_sides_of_the_wire() -> None:
    assert is_sealed(KEY, DONE)
    assert is_sealed(KEY, decode(encode(DONE)))


def test_a_repeat_with_another_sequence_number_is_the_same_done() -> None:
    assert is_sealed(KEY, replace(DONE, header=replace(HEADER, sequence=99)))


SWAPPED = (ENTRIES[0], GroupDigests.of(1, (0, 3, 0, 2), {3: 13, 4: 12}))


@pytest.mark.parametrize(
    "forged",
    [
        replace(DONE, header=replace(HEADER, epoch=3)),
        replace(DONE, header=replace(HEADER, transfer_id="f" * 32)),
        replace(DONE, header=replace(HEADER, source="other")),
        replace(DONE, header=replace(HEADER, destination="other")),
        replace(DONE, header=replace(HEADER, source="prefilld", destination="ecode")),
        changed(DONE, rank=1),
        replace(DONE, num_ranks=2),
        replace(DONE, num_slices=1),
        replace(DONE, manifest=ENTRIES[:1]),
        changed(DONE, manifest=ENTRIES[::-1]),
        replace(DONE, manifest=SWAPPED),
        replace(DONE, manifest=(GroupDigests.of(0, (0, 1, 0, 2), {3: 10}), ENTRIES[1])),
        replace(DONE, manifest=(GroupDigests.of(0, (0, 1, 0, 2), {4: 11}), ENTRIES[1])),
        replace(DONE, manifest=(ENTRIES[0], replace(ENTRIES[1], group=2))),
        replace(DONE, manifest=(replace(ENTRIES[0], rectangle=(0, 1, 0, 1)), ENTRIES[1])),
        replace(DONE, first_token=None),
        replace(DONE, first_token=replace(FIRST, token_id=6)),
        replace(DONE, first_token=replace(FIRST, logprobs=None)),
        replace(DONE, first_token=replace(FIRST, logprobs=TokenLogprobs(-0.25, ((5, -0.25), (6, -1.25))))),
        replace(DONE, first_token=replace(FIRST, state=SamplingState(1, ((5, 1),)))),
        replace(DONE, first_token=replace(FIRST, state=replace(FIRST.state, output_counts=((5, 2),)))),
        replace(DONE, first_token=replace(FIRST, state=replace(FIRST.state, version=2))),
        replace(DONE, mac=b""),
        replace(DONE, mac=DONE.mac[:-1]),
    ],
)
def test_a_change_of_anything_bound_breaks_the_seal(forged: Done) -> None:
    assert not is_sealed(KEY, forged)


def test_another_key_does_not_seal() -> None:
    assert not is_sealed(KEY[::-1], DONE)


@given(st.integers(0, 255), st.integers(0, 31))
def test_every_bit_of_the_mac_counts(mask: int, position: int) -> None:
    mac = bytearray(DONE.mac)
    mac[position] ^= mask
    assert is_sealed(KEY, replace(DONE, mac=bytes(mac))) == (mask == 0)


def test_whole_numbers_in_logprobs_survive_the_wire() -> None:
    token = replace(FIRST, logprobs=TokenLogprobs(0, ((5, 0), (6, -3))))
    done = seal(KEY, HEADER, rank=0, num_ranks=1, num_slices=0, manifest=(), first_token=token)
    assert is_sealed(KEY, decode(encode(done)))


def test_a_unit_of_equal_geometry_is_all_layers_and_heads_of_its_group() -> None:
    assert [whole_group(group) for group in GEOMETRY.groups] == [(0, 1, 0, 2), (0, 3, 0, 2)]
