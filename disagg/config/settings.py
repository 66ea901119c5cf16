"""Every setting of every command: a field is a flag, a `DISAGG_*` variable, a YAML key and a line of `--help`."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from disagg.config.demo import DEMO_MODEL, demo_model_folder, is_demo_model
from disagg.config.quantities import (
    device,
    endpoint_host,
    event_endpoint,
    group_tokens,
    header_key,
    is_loopback,
    one_line,
    parse_nbytes,
    plain_name,
    power_of_two,
    split_list,
    tcp_endpoint,
    yaml_switch,
)

PLANES: Final = ("shm", "tcp", "ucx", "zmq")
DEFAULT_PLANES: Final = ("shm", "tcp", "zmq")  # what needs no further package
LAST_PORT: Final = 65535
CONTROL_PORT: Final = 8998  # next to 8000, free of registered services, the same on every machine of a deployment

Role = Literal["prefill", "decode", "both"]
Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Nbytes = Annotated[int, Field(ge=1), BeforeValidator(parse_nbytes)]
Names = Annotated[tuple[str, ...], BeforeValidator(split_list)]
Endpoint = Annotated[str, BeforeValidator(tcp_endpoint)]
EventEndpoint = Annotated[str, BeforeValidator(event_endpoint)]
Device = Annotated[str, AfterValidator(device)]
Devices = Annotated[tuple[Device, ...], Field(min_length=1), BeforeValidator(split_list)]
Key = Annotated[str, AfterValidator(header_key)]
Line = Annotated[str, AfterValidator(one_line)]
WorkerId = Annotated[str, AfterValidator(plain_name)]
BlockSize = Annotated[int, Field(ge=1), AfterValidator(power_of_two)]
Sizes = Annotated[tuple[Nbytes, ...], BeforeValidator(split_list)]
GroupTokens = Annotated[tuple[str, ...], AfterValidator(group_tokens), BeforeValidator(split_list)]
Scratch = Annotated[Literal["off", "on", "reuse"], BeforeValidator(yaml_switch)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
KvDtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16", "fp8_e4m3", "int8"],
    BeforeValidator(lambda value: "fp8_e4m3" if value == "fp8" else value),
]
KV_DTYPE_HELP: Final = "KV cache type; `fp8` is fp8_e4m3, `int8` needs --kv-scales, auto is the compute type"


class ModelSettings(BaseModel):
    """What every command is told."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, protected_namespaces=())

    model: str = Field(
        DEMO_MODEL,
        description="Model folder or hub id; `demo` is the bundled model",
        min_length=1,
        validate_default=True,
    )

    @field_validator("model")
    @classmethod
    def _find_bundled_model(cls, value: str) -> str:
        return str(demo_model_folder()) if value == DEMO_MODEL else value


class PlanSettings(ModelSettings):
    """`disagg plan`."""

    dtype: Dtype = Field("auto", description="Type that the model computes in; auto as its config.json says")
    kv_cache_dtype: KvDtype = Field("auto", description=KV_DTYPE_HELP)
    prompt_len: Count | None = Field(None, description="Tokens of the prompt [default: as many as a sequence may have]")
    block_size: BlockSize = Field(16, description="Tokens per KV block; a power of two")
    max_model_len: Count | None = Field(None, description="Prompt plus answer limit [default: what the model allows]")
    max_num_batched_tokens: Count | None = Field(
        None,
        description="Prompt tokens computed in one step, for which `--budget` leaves room [default: the whole prompt, "
        "and `--budget` leaves none]",
    )
    max_num_seqs: Count = Field(
        64, description="As of a worker, for `--budget`: sequences that its KV cache is made for"
    )
    cached: GroupTokens = Field(
        (), description="GROUP=TOKENS,...: what the decode worker holds of the prompt already, such as full=512"
    )
    swa_scratch: Scratch = Field("off", description="As of a prefill worker: windowed blocks in scratch slots")
    enforce_eager: bool = Field(False, description="As of a worker on a GPU: no CUDA graphs take memory")
    piecewise_graphs: bool = Field(False, description="As of a worker on a GPU: pieces of prompt steps take memory too")
    budget: Sizes = Field(
        (), description="Count the sequences that so much KV memory of one worker seats, such as 8GiB,70GiB"
    )

    @property
    def cached_tokens(self) -> dict[str, int]:
        """By layer group; the last value given for a group counts."""
        return {name: int(count) for name, _, count in (entry.partition("=") for entry in self.cached)}


class SimulateSettings(ModelSettings):
    """`disagg simulate`: what workers are made of, how many there are, and what they are judged by."""

    rates: Path | None = Field(None, description="JSON file that `disagg bench rates` wrote, or one like it; needed")
    fleets: Names = Field(
        ("1p1d",), description="Fleets to compare: prefill, decode and `both` workers, such as 1p1d,2p2d,4b"
    )
    policies: Names = Field(("round-robin", "least-loaded", "prefix-aware"), description="Policies to compare")
    cores: Count | None = Field(
        None, description="Cores that all workers and the front end share [default: a device for each worker]"
    )
    speed: float = Field(1.0, gt=0, description="Requests arrive so many times as fast as the trace says")
    ttft: Seconds = Field(2.0, description="Objective: seconds to the first token")
    itl: Seconds = Field(0.1, description="Objective: seconds from token to token, in the mean of an answer")
    max_local_prefill: int = Field(
        0, ge=0, description="Policy prefix-aware: most prompt tokens computed where other answers are decoded"
    )
    plots: Path | None = Field(None, description="Folder for SVG plots")
    dtype: Dtype = Field("auto", description="Type that the model computes in; auto as its config.json says")
    kv_cache_dtype: KvDtype = Field("auto", description=KV_DTYPE_HELP)
    block_size: BlockSize = Field(16, description="Tokens per KV block; a power of two")
    max_model_len: Count | None = Field(None, description="Prompt plus answer limit [default: what the model allows]")
    max_num_seqs: Count = Field(64, description="As of a worker: sequences computed in one step")
    max_num_batched_tokens: Count = Field(512, description="As of a worker: tokens computed in one step")
    kv_cache_memory: Nbytes = Field(1 << 30, description="KV cache bytes of one worker, such as 40GiB [default: 1GiB]")
    enable_prefix_caching: bool = Field(True, description="Keep blocks of finished requests and reuse equal prefixes")
    max_queued: Count = Field(1024, description="Requests that may wait at the router; more are refused")
    requests: Count | None = Field(
        None, description="Requests to simulate [default: all of a file, 1000 of a made-up trace]"
    )
    rate: float = Field(1.0, gt=0, description="Of a made-up trace: requests per second")
    prompt: Count = Field(512, description="Of a made-up trace: tokens of a typical prompt")
    answer: Count = Field(128, description="Of a made-up trace: tokens of a typical answer")
    seed: int = Field(0, description="Of a made-up trace: the same seed makes the same trace")
    write_trace: Path | None = Field(None, description="File that the trace is written to, in the form that is read")


class Settings(ModelSettings):
    """What every process is told."""

    insecure: bool = Field(False, description="Use the published secret and no encryption; loopback only")
    verify_weights: bool = Field(
        False, description="Hash whole weight files into the model's fingerprint; the same on router and workers"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log line to write"
    )


class SecretSettings(Settings):
    secret_file: Path | None = Field(None, description="File with the cluster secret, readable by its owner only")


class HttpSettings(Settings):
    """What the router serves and how."""

    host: str = Field("127.0.0.1", description="Address of the HTTP API", min_length=1)
    port: Port = Field(8000, description="Port of the HTTP API; 0 takes a free one")
    served_model_name: Line | None = Field(None, description="Model name in the API [default: as given to --model]")
    api_key: Key | None = Field(None, description="Bearer key that clients must send", min_length=1, repr=False)
    api_key_file: Path | None = Field(
        None,
        description="File with lines of TENANT KEY [weight=N] [max_requests=N] [max_tokens=N], beside or instead of "
        "--api-key; readable by its owner only",
    )
    api_processes: int | None = Field(
        None,
        ge=0,
        le=64,
        description="Processes for HTTP, text and tokens; 0: the router's own does it [default: 0 on up to 4 cores, "
        "else a quarter of the cores, 8 at most]",
    )
    max_attempts: Count = Field(3, description="Attempts per request in all; 1 means no retry")
    max_continuations: Count = Field(
        8, description="Times that one answer goes on elsewhere when its worker is lost in the middle of it"
    )
    no_continue: bool = Field(False, description="End an answer with an error when its worker is lost in the middle")
    request_timeout_s: Seconds = Field(600.0, description="Seconds after which a request is given up")
    policy: Literal["prefix-aware", "least-loaded", "round-robin"] = Field(
        "prefix-aware",
        description="How a worker is chosen: `prefix-aware` takes the cheapest way by estimated seconds, which counts "
        "queues, cached prefixes, links and what answers wait; the others always take a prefill and a decode worker",
    )
    max_local_prefill: int = Field(
        0,
        ge=0,
        description="Prompt tokens that a worker may compute where answers are decoded, when `prefix-aware` finds that "
        "cheaper than a transfer; 0: none",
    )
    kv_events: EventEndpoint | None = Field(
        None,
        description="tcp://HOST:PORT at which cached blocks are published as vLLM does; the next port replays. On "
        "loopback, unless with --kv-events-keys or --insecure",
    )
    kv_events_tokens: bool = Field(
        False, description="Publish the token ids of blocks too: without them the stream shows load, not prefixes"
    )
    kv_events_keys: Path | None = Field(
        None, description="File with the CURVE public keys (Z85) of those that may subscribe, one a line; encrypts"
    )
    max_queued: Count = Field(1024, description="Requests that may wait; more get 503 with Retry-After")
    connect: Literal["auto", "eager", "lazy"] = Field(
        "auto",
        description="When decode workers connect to prefill workers: eager, to all of them before a request comes; "
        "lazy, to those that a request needs; auto: eager in a fleet of up to 64 workers",
    )

    @model_validator(mode="after")
    def _publishes_where_it_may(self) -> Self:
        if self.kv_events is None:
            return self
        host, port = endpoint_host(self.kv_events), urlsplit(self.kv_events).port or 0
        if not is_loopback(host) and self.kv_events_keys is None and not self.insecure:
            raise ValueError(
                f"kv_events: `{host}` is not loopback: give subscribers' keys with `--kv-events-keys FILE`"
            )
        if port == LAST_PORT:
            raise ValueError(f"kv_events: port {port}, expected at most {LAST_PORT - 1}: the next one replays")
        return self

    @property
    def served_name(self) -> str:
        """The model's name in the API."""
        return self.served_model_name or (DEMO_MODEL if is_demo_model(self.model) else self.model)


class RouterSettings(HttpSettings, SecretSettings):
    """`disagg router`."""

    admin_port: Port = Field(
        8001, description="Loopback port of the admin listener: records of requests; 0 takes a free one"
    )
    control_host: str = Field("127.0.0.1", description="Address where workers register", min_length=1)
    control_port: Port = Field(CONTROL_PORT, description="Port where workers register; 0 takes a free one")

    @model_validator(mode="after")
    def _keep_insecure_local(self) -> Self:
        _refuse_insecure(self.insecure, "control_host", self.control_host)
        return self


class EngineSettings(Settings):
    """What a worker computes with. `up` hands them to all of its workers."""

    dtype: Dtype = Field(
        "auto",
        description="Type that the model computes in; auto as its config.json says, on a CPU float32 where the "
        "processor multiplies that faster and memory allows it",
    )
    kv_cache_dtype: KvDtype = Field("auto", description=KV_DTYPE_HELP)
    kv_scales: Path | None = Field(
        None, description="JSON file with fp8 or int8 scales per layer [default: the checkpoint's, else 1.0]"
    )
    block_size: BlockSize = Field(16, description="Tokens per KV block; a power of two")
    max_model_len: Count | None = Field(
        None, description="Prompt plus answer limit [default: what model and memory allow]"
    )
    max_num_seqs: Count = Field(64, description="Sequences computed in one step; the KV cache is made for so many")
    max_num_batched_tokens: Count = Field(512, description="Tokens computed in one step; longer prompts go in chunks")
    kv_cache_memory: Nbytes | None = Field(
        None,
        description="KV cache bytes, such as 512MiB; `up` divides them among its workers. More than --max-num-seqs "
        "sequences can fill is left unused, for cached prefixes too [default: a share of what is free]",
    )
    enable_prefix_caching: bool = Field(True, description="Keep blocks of finished requests and reuse equal prefixes")
    enforce_eager: bool = Field(False, description="Capture no CUDA graphs: every step runs the model's Python")
    piecewise_graphs: bool = Field(
        False,
        description="On CUDA, capture steps with prompt tokens too, in pieces between attentions; off, as no "
        "GPU has yet shown that its tokens are those of eager steps",
    )
    overlap_steps: bool = Field(
        False, description="On CUDA, launch a step before the last one's tokens are read; no GPU has run it yet"
    )
    torch_compile: bool = Field(
        False, description="Compile the model with torch.compile at start; takes a minute, and on CPUs a C++ compiler"
    )
    tensor_parallel_size: Count = Field(1, description="Ranks per worker", json_schema_extra={"hidden": True})
    planes: Names = Field(
        DEFAULT_PLANES, description="Ways to move KV, preferred first: shm (one host), tcp, ucx and zmq (encrypted)"
    )
    swa_scratch: Scratch = Field(
        "off",
        description="Prefill workers: windowed blocks that a step outdates share scratch slots, so more prompts fit; "
        "`reuse` keeps those that the same prompt, asked again, begins with; without a value: on. Off by default, as "
        "prompts that share a beginning lose its reuse",
    )
    fetch_wait_s: Seconds = Field(
        30.0, description="Seconds that computed KV waits for the decode worker to ask for it"
    )
    # A flipped bit lives a minute at most among prefixes in use; hashing 1 GiB a minute takes a core 0.2 s of it.
    prefix_recheck_s: Seconds = Field(
        60.0, description="Seconds after which a reused prefix block is hashed again before use"
    )
    check: bool = Field(False, description="Check the cache's invariants after each step (slow)")

    @model_validator(mode="after")
    def _gives_every_sequence_its_token(self) -> Self:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens: {self.max_num_batched_tokens}, expected at least max_num_seqs "
                f"({self.max_num_seqs}): a step gives every answer its next token"
            )
        return self

    @model_validator(mode="after")
    def _is_traced_once(self) -> Self:
        if self.torch_compile and self.piecewise_graphs:
            raise ValueError("torch_compile: expected without piecewise_graphs: either traces the model for itself")
        return self

    @field_validator("tensor_parallel_size")
    @classmethod
    def _is_one_rank(cls, value: int) -> int:
        if value > 1:
            raise ValueError("expected 1: workers of several ranks are not supported, start more workers instead")
        return value

    @field_validator("planes")
    @classmethod
    def _are_known_planes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) < len(value) or set(value) - set(PLANES):
            raise ValueError(f"expected one or more of {', '.join(PLANES)}, each once, preferred first")
        return value


class WorkerSettings(EngineSettings, SecretSettings):
    """`disagg prefill`, `disagg decode` and `disagg both`: the role is the command."""

    router: Endpoint = Field(f"tcp://127.0.0.1:{CONTROL_PORT}", description="Control endpoint of the router")
    worker_id: WorkerId | None = Field(None, description="Name in logs and metrics [default: role-host-pid]")
    host: str = Field("127.0.0.1", description="Address where peer workers connect", min_length=1)
    advertise_host: str | None = Field(None, description="Address told to peers [default: --host]", min_length=1)
    device: Device = Field("cpu", description="cpu, cuda or cuda:N")
    threads: Count | None = Field(None, description="CPU threads of the model [default: all cores]")
    # Under the 30 s that Kubernetes waits by default before it kills: what is left is still handed back in order.
    drain_timeout_s: Seconds = Field(25.0, description="Seconds that running answers get to finish after SIGTERM")
    memory_share: float = Field(1.0, gt=0, le=1, description="This worker's part of the default KV cache memory")

    @model_validator(mode="after")
    def _keep_insecure_local(self) -> Self:
        _refuse_insecure(self.insecure, "host", self.host)
        _refuse_insecure(self.insecure, "router", endpoint_host(self.router))
        return self

    @model_validator(mode="after")
    def _can_be_reached(self) -> Self:
        if self.host in {"0.0.0.0", "::"} and self.advertise_host is None:  # noqa: S104 (compared, never bound here)
            raise ValueError(f"host: `{self.host}` is no address a peer can connect to: add `--advertise-host`")
        return self

    def name(self, role: Role) -> str:
        """The worker id, given or made from role, host and pid."""
        return self.worker_id or f"{role}-{socket.gethostname()}-{os.getpid()}"

    @property
    def peer_host(self) -> str:
        """The address that peers are told."""
        return self.advertise_host or self.host


class UpSettings(HttpSettings, EngineSettings):
    """`disagg up`: router and workers on this machine, connected over loopback."""

    admin_port: Port = Field(
        0, description="Loopback port of the admin listener: records of requests; 0 takes a free one"
    )
    control_port: Port = Field(0, description="Loopback port where workers register; 0 takes a free one")
    prefill: int = Field(1, ge=0, description="Prefill workers")
    decode: int = Field(1, ge=0, description="Decode workers")
    both: int = Field(0, ge=0, description="Workers that do both, without a transfer")
    prefill_devices: Devices | None = Field(
        None, description="Devices of prefill workers in turn, such as cuda:0,cuda:1 [default: the GPUs, else cpu]"
    )
    decode_devices: Devices | None = Field(
        None, description="Devices of decode (and `both`) workers in turn [default: the GPUs, else cpu]"
    )
    threads: Count | None = Field(
        None, description="CPU threads of each worker [default: cores / workers, what is left goes to prefill]"
    )
    prefill_threads: Count | None = Field(None, description="CPU threads of each prefill worker [default: --threads]")
    decode_threads: Count | None = Field(None, description="CPU threads of each decode worker [default: --threads]")

    @model_validator(mode="after")
    def _can_serve(self) -> Self:
        if not self.both and not (self.prefill and self.decode):
            raise ValueError("prefill: no worker could answer: start a prefill and a decode worker, or `--both 1`")
        return self

    @property
    def num_workers(self) -> int:
        return self.prefill + self.decode + self.both


class DemoSettings(UpSettings):
    """`disagg demo`: as `up`, but every port is a free one, and logs are quiet unless asked for."""

    port: Port = Field(0, description="Port of the HTTP API; 0 takes a free one")
    verify_weights: bool = Field(
        False, description="Hash whole weight files into the model's fingerprint; the same on router and workers"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "warning", description="Least severe log line to write"
    )


class RatesSettings(EngineSettings):
    """`disagg bench rates`: a worker's settings, and what is measured beside its steps."""

    device: Device = Field("cpu", description="cpu, cuda or cuda:N")
    threads: Count | None = Field(None, description="CPU threads of the model, as its workers will have [default: all]")
    rounds: Count = Field(5, description="Times that each is measured; the median counts")
    serving: bool = Field(
        True, description="Start a prefill and a decode worker, and count what router, API and client take of the CPU"
    )


def _refuse_insecure(insecure: bool, field: str, host: str) -> None:
    """Raise ValueError, naming the field, when the published secret would leave this machine."""
    if insecure and not is_loopback(host):
        raise ValueError(f"{field}: `{host}` is not loopback and `--insecure` is: give a `--secret-file` instead")
