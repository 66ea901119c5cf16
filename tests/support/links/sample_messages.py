"""One message of every kind, every field away from its default: what the golden bytes were made of."""

from __future__ import annotations

import struct

from disagg.transceiver.wire.messages import blocks as b
from disagg.transceiver.wire.messages import peer as p
from disagg.transceiver.wire.messages import router as r
from disagg.transceiver.wire.messages import values as v
from disagg.transceiver.wire.messages.digests import GroupDigests
from disagg.transceiver.wire.messages.prompt_logprobs import PromptLogprobs
from disagg.transceiver.wire.messages.rates import MeasuredRates
from disagg.transceiver.wire.messages.tokens import ChoiceOutput, StepTokens, TokenCredit, Tokens

ID = "00112233445566778899aabbccddeeff"
HEADER = p.Header("prefill", "decode", ID, 2, 41)
IDENTITY = v.Identity(1, "fingerprint", "w64:softcap50", "float32", 4096, "a1b2", ("adapter",))
SCALES = ((((0.5, 0.25), (1.0, 2.0)),), ())
GEOMETRY = v.Geometry(
    32,
    "float8_e4m3fn",
    (v.GroupSemantics(None, 0, 2, 64, (3,)), v.GroupSemantics(64, 4, 2, 64, (0, 1, 2))),
    (4096, 8192),
    2,
    2,
    "layer-kv-token-head-dim",
    SCALES,
    ((0, 1), (2, 3)),
    1,
)
UNITS = (v.UnitName(1, 7),)
LOGPROBS = v.TokenLogprobs(-0.25, ((5, -0.25), (6, -1.5)))
FIRST = v.FirstToken(5, LOGPROBS, v.SamplingState(2**63 + 1, ((5, 1),)), 32, (v.OtherFirst(6, LOGPROBS),))
SAMPLING = v.Sampling(
    16, 9, 0.5, 40, 0.9, 0.05, 1.1, 0.2, 0.3, ((1, -100.0),), 2, True, (1, 106), (7,), 5, "salt", 3, 2
)
SCORES = PromptLogprobs(
    7, struct.pack("<2f", -0.5, -1.5), struct.pack("<2i", 1, 2), struct.pack("<2i", 5, 6), struct.pack("<2f", -0.5, -1)
)
TARGET = r.PeerTarget(ID, "prefill-0", "tcp://127.0.0.1:5000", GEOMETRY)

SAMPLES = (
    p.Hello(ID, "decode-0", IDENTITY, GEOMETRY, ("shm", "zmq"), ("handoff", "prefix")),
    p.Welcome(ID, "prefill-0", IDENTITY, GEOMETRY, (v.PlaneOffer("shm", "/run/x", b"token", b"nonce"),), ("prefix",)),
    p.Refused("block_size", "32", "16", ID, ID, 1),
    p.Fetch(
        HEADER,
        b"ticket",
        100,
        (v.GroupRuns(0, ((0, 4),)), v.GroupRuns(1, ((0, 1), (2, 2)))),
        "shm",
        "prefix",
        bytes(range(16)),
        (v.GroupRuns(0, ((4, 2),)),),
    ),
    p.Accepted(HEADER, 3, 96, "float16:ab", (7, 8), (LOGPROBS, LOGPROBS)),
    p.Slice(HEADER, 1, (v.UnitRun(1, 2, 2, (10, 11), (2**40, 7)),)),
    p.Received(HEADER, -1),
    p.Done(
        HEADER, 0, 1, 2, (GroupDigests.of(1, (0, 3, 0, 2), {2: 2**64 - 1, 3: 5}),), FIRST, b"mac", "prefix", 96, "x"
    ),
    p.Failed(HEADER, "deadline", UNITS),
    p.Cancelled(HEADER, "finished"),
    p.Ack(HEADER),
    p.Cancel(HEADER, "digest", UNITS),
    p.Closed(HEADER),
    p.Heartbeat("decode", "prefill", ((ID, 2),)),
    r.Register(
        ID,
        "prefill-0",
        "prefill",
        IDENTITY,
        GEOMETRY,
        ("shm",),
        "tcp://h:1",
        42,
        "host",
        "cpu",
        (64, 128),
        (1, 106),
        ("handoff", "prefix"),
        ("prefix",),
    ),
    r.Registered(ID, ID, 5001, 32),
    r.Pulse(ID, ((ID, 2),)),
    r.Peers((TARGET,), (ID,)),
    r.Lease(
        ID,
        ID,
        "draining",
        (v.MetricSample("disagg_x", "gauge", (("pool", "0"),), 1.5),),
        ((ID, 2),),
        1,
        2,
        (3,),
        (4,),
        (r.LinkStatus(ID, "prefill-0", "shm", "ready", 9.5, "fine", 0.25),),
        MeasuredRates(1500.5, 0.5, ((1, 0.25), (7, 0.75))),
        ((ID, 3),),
    ),
    r.Dispatch(
        ID,
        2,
        "request",
        "serve",
        (1, 2, 300),
        SAMPLING,
        600.0,
        TARGET,
        b"ticket",
        5,
        r.PrefixLeg(ID[::-1], TARGET, 96, b"ticket"),
        (ChoiceOutput(0, (7, 8)), ChoiceOutput(1, ())),
        ID[::-1],
        12.5,
    ),
    r.Grant(ID[::-1], 2, ID, "prefix", TARGET, 600.0, (1, 2, 300), "salt", 17),
    r.Resume(ID, 3),
    StepTokens.of((Tokens(ID, 2, 0, (5, 6), (LOGPROBS, LOGPROBS), 32, 1), Tokens(ID[::-1], 1, 7, (8,)))),
    TokenCredit(48),
    b.BlockEvents(ID, 7, 2, ((0, 1), (1,)), bytes([3, 1, 6, 4]), bytes(range(64)), bytes(16), bytes(24), True),
    b.AskBlocks(ID, True),
    r.PromptScores(ID, 2, SCORES),
    r.Finished(ID, 2, 17, "stop", 106, 1),
    r.RequestFailed(ID, 2, 503, "no room"),
    r.TransferFailure(ID, 2, "lost", UNITS),
    r.Retarget(ID, 3, TARGET, b"ticket"),
    r.PrefillLocally(ID, 3),
    r.CancelRequest(ID, 2, "disconnect"),
    r.CancelChoice(ID, 2, 1),
    r.TransferReport(
        ID,
        2,
        "decode-0",
        "shm",
        (v.GroupBytes(1, "window-64", 2, 98304, 4, 196608),),
        v.StageTimes((("wire", 0.5),)),
        3,
        "prefix",
    ),
)

PEER_SAMPLES = tuple(sample for sample in SAMPLES if type(sample).__module__ == p.__name__)
"""Those that workers say to each other."""
