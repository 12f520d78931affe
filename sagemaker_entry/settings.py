"""The one table of settings: read once from the environment, frozen, handed to the child processes as JSON.

Owns: names, aliases, types, defaults, ranges of everything an operator can set.
Must not know: HTTP, gunicorn, the engine's internals. Reading is a function of the mapping it is given.
Invariant: a malformed value, or an unknown name under STRONGROOM_, raises; nothing is corrected or dropped.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sagemaker_entry.foreign_settings import GUARDED, IGNORED
from sagemaker_entry.setting_values import SettingsError as SettingsError
from sagemaker_entry.setting_values import parsed, translated

PREFIX: Final = "STRONGROOM_"
UNIX: Final = "unix:"
MIB: Final = 1024 * 1024
BATCH_DEADLINE_S: Final = 590.0  # under the 600 s that a batch job waits for an answer unless told otherwise
ROOT: Final = r"ed25519:[0-9a-f]{64}(@[0-9]{1,12})?"
ROOTS: Final = rf"{ROOT}(,{ROOT}){{0,15}}"
ROOTS_RULE: Final = "1 to 16 of `ed25519:HEX`, each with `@SECONDS` after which it ends, joined by commas"


def _setting(default: Any, doc: str, **rules: Any) -> Any:
    """Return a field.

    Rules: unit, aliases, choices, low and high, pattern and rule, first (it wins), foreign (what the values
    of the aliases mean here: others are refused), instead_of (fields that must not be set beside it),
    only_with (the field that must be).
    """
    return dataclasses.field(default=default, metadata={"doc": doc, **rules})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything an operator can set. Field `x_y` is the variable STRONGROOM_X_Y; None means derived."""

    model: str = _setting(
        "/opt/ml/model",
        "Directory of the model artifact.",
        aliases=("HF_MODEL_ID",),
        pattern=r"/.*",
        rule="an absolute path; models are never downloaded",
    )
    key: str | None = _setting(
        None,
        "Where the sealed package's key comes from: `file:/PATH`, `file:/PATH?unlink`, `fd:N`, "
        "`channel:NAME`, `image:/PATH,/PATH`, `recipient:SOURCE`, `licence:/PATH,SOURCE` or `invocation:` "
        "(`model_package/KEYS.md`). Never the key itself.",
        pattern=r"[a-z]{2,16}:[!-~]{0,4096}",
        rule="a key source, such as `file:/run/secrets/key`",
    )
    vendor_roots: str | None = _setting(
        None,
        "Public keys that may sign the package, which is then the vendor's.",
        pattern=ROOTS,
        rule=ROOTS_RULE,
    )
    customer_roots: str | None = _setting(
        None,
        "Public keys that may sign the package, which is then the customer's own.",
        pattern=ROOTS,
        rule=ROOTS_RULE,
    )
    min_epoch: int = _setting(
        0, "Least `epoch` of a package that may start: older ones were revoked.", low=0, high=2**31 - 1
    )
    verify: str = _setting(
        "read",
        "What is proven of the package: every chunk that is read, by the signed digest and the cipher; or, "
        "before anything is opened, every byte of it.",
        choices=("read", "full"),
    )
    state_dir: str | None = _setting(
        None,
        "Directory that outlives the container, where the time of the last start is kept: a clock turned "
        "back is then seen. For `licence:` alone.",
        pattern=r"/.*",
        rule="an absolute path",
    )
    allow_plaintext: str = _setting(
        "off",
        "`on` serves a model that is not sealed, and no sealed one. Shown by `/ping` and `/metrics`.",
        choices=("off", "on"),
    )
    served_name: str | None = _setting(
        None,
        "Name in replies and in `/v1/models`. Derived: the last part of the model's path.",
        pattern=r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}",
        rule="1 to 128 of `A-Za-z0-9._/-`",
    )
    host: str = _setting(
        "0.0.0.0",  # noqa: S104  the hosting contract asks for all interfaces
        "Address to listen on.",
        pattern=r"[0-9A-Fa-f.:]{2,45}",
        rule="an IPv4 or IPv6 address",
    )
    port: int = _setting(
        8080, "Port to listen on; 0 takes a free one.", first="SAGEMAKER_BIND_TO_PORT", low=0, high=65535
    )
    listen: str | None = _setting(
        None,
        "Unix socket to listen on instead of a port, as `unix:/PATH`. No port is opened then, so that the "
        "container can run without any network.",
        pattern=UNIX + r"/[A-Za-z0-9._/@-]{1,106}",
        rule="`unix:` and an absolute path of at most 107 characters `A-Za-z0-9._/@-`",
        instead_of=("host", "port"),
    )
    socket_mode: str = _setting(
        "0660",
        "Who may connect to the Unix socket, as far as its directory lets them: owner, group, or all.",
        choices=("0600", "0660", "0666"),
        only_with="listen",
    )
    workers: int = _setting(2, "HTTP worker processes.", low=1, high=16)
    max_sequence_tokens: int | None = _setting(
        None,
        "Longest prompt and output together. Derived: the model's window.",
        unit="tokens",
        aliases=("MAX_TOTAL_TOKENS",),
        low=16,
        high=16_777_216,
    )
    max_input_tokens: int | None = _setting(
        None,
        "Longest prompt. Derived: the sequence limit minus one.",
        unit="tokens",
        aliases=("MAX_INPUT_TOKENS", "MAX_INPUT_LENGTH"),
        low=1,
        high=16_777_215,
    )
    max_concurrent_requests: int = _setting(
        128,
        "Generations held at once, over all workers; the next one is answered 429.",
        aliases=("MAX_CONCURRENT_REQUESTS",),
        low=1,
        high=512,
    )
    max_running: int | None = _setting(
        None, "Sequences computed together. Derived from model and machine.", low=1, high=4096
    )
    max_waiting: int | None = _setting(
        None,
        "Sequences that may wait for a place among those computed; the next request is answered 429. "
        "Derived: four times the places.",
        low=0,
        high=65536,
    )
    max_wait_s: float = _setting(
        5.0,
        "Estimated wait for a place from which on requests are answered 429.",
        unit="s",
        low=0.1,
        high=3600,
    )
    step_tokens: int | None = _setting(
        None, "Token budget of one step. Derived.", unit="tokens", low=16, high=1_048_576
    )
    kv_mib: int | None = _setting(
        None, "Memory for keys and values. Derived from the memory limit.", unit="MiB", low=1, high=4_194_304
    )
    prefix_cache: str = _setting(
        "tenant", "Reuse of common prompt prefixes, within one tenant.", choices=("tenant", "off")
    )
    compat: str = _setting(
        "auto",
        "What to do with a model that fails the load probe: serve it on the slower runner, or refuse it.",
        choices=("auto", "off"),
    )
    dtype: str = _setting(
        "auto", "Number format of the computation.", choices=("auto", "float32", "bfloat16")
    )
    kv_dtype: str = _setting(
        "auto",
        "How keys and values are stored. `auto`: as computed. The others need native operators.",
        choices=("auto", "float32", "bfloat16", "int8"),
    )
    quantize: str = _setting(
        "auto",
        "How weights are stored. `auto` chooses by hardware, never below 8 bits.",
        choices=("auto", "none", "bnb-nf4", "bnb-int8", "int8-block", "int4-block", "fp8"),
        aliases=("QUANTIZE", "HF_MODEL_QUANTIZE"),
        foreign={"bitsandbytes": "bnb-int8", "bitsandbytes-nf4": "bnb-nf4", "fp8": "fp8"},
    )
    speculate: str = _setting(
        "auto",
        "Guessing tokens ahead from what the text repeats, while few requests run and the guesses hold. It "
        "changes no output, only speed.",
        choices=("auto", "off"),
    )
    surgery: str = _setting(
        "auto",
        "Fused forms of the model's own modules, each installed only where it computes the same: where they "
        "pay (nowhere on a CPU), all, or none.",
        choices=("auto", "on", "off"),
    )
    tensor_parallel: int = _setting(
        1,
        "Ranks, one process per accelerator, that hold one model together.",
        aliases=("SM_NUM_GPUS",),
        low=1,
        high=64,
    )
    threads: int | None = _setting(
        None,
        "Compute threads, over all ranks. Derived: the cores the container may use.",
        low=1,
        high=512,
    )
    dialect: str = _setting(
        "auto",
        "Dialect of bodies on `/invocations`: chosen by the body, or fixed. `auto` reads as OpenAI's what a "
        "Cohere client's plainest v2 chat and generate bodies share with it; `cohere` reads them as its own.",
        choices=("auto", "openai", "tgi", "cohere"),
    )
    sessions: str = _setting(
        "off",
        "Stateful sessions. One holds an id and an expiry, in memory; what makes a conversation in it faster "
        "is the prefix cache of the container that the platform leads it back to.",
        choices=("off", "on"),
        aliases=("SAGEMAKER_ENABLE_STATEFUL_SESSIONS",),
        foreign={"true": "on", "false": "off", "1": "on", "0": "off"},
    )
    max_sessions: int = _setting(
        1024, "Sessions open at once; the next one is answered 429.", low=1, high=4096
    )
    session_s: float = _setting(
        1200.0,
        "Life of a session.",
        unit="s",
        aliases=("SAGEMAKER_SESSIONS_EXPIRATION",),
        low=1,
        high=86_400,
    )
    metering: str = _setting(
        "off",
        "Marketplace metering header on successful replies of `/invocations`. `inference`: one unit of "
        "`inference.count` a request, one a prompt of a list, one a line of JSON lines.",
        choices=("off", "inference"),
    )
    stream_error: str = _setting(
        "abort",
        "How a stream that fails ends after its error event: broken off (the platform then reports an error) "
        "or ended normally.",
        choices=("abort", "event"),
    )
    unknown_fields: str = _setting("refuse", "Body fields nobody knows.", choices=("refuse", "ignore"))
    max_best_of: int = _setting(2, "Largest `best_of`.", aliases=("MAX_BEST_OF",), low=1, high=16)
    max_stop_sequences: int = _setting(
        4, "Most stop strings of a TGI request.", aliases=("MAX_STOP_SEQUENCES",), low=0, high=16
    )
    max_top_n_tokens: int = _setting(
        5, "Largest `top_n_tokens` of a TGI request.", aliases=("MAX_TOP_N_TOKENS",), low=0, high=20
    )
    request_deadline_s: float = _setting(
        58.0,
        "Time for a whole answer, then 504; of JSON lines, for each. In a batch job (`SAGEMAKER_BATCH`) 590 "
        "unless set: a call may last 600 s there.",
        unit="s",
        low=1,
        high=3600,
    )
    stream_deadline_s: float = _setting(478.0, "Time for a whole stream.", unit="s", low=1, high=3600)
    drain_s: float = _setting(25.0, "Time running requests get after SIGTERM.", unit="s", low=0, high=25)
    body_limit_bytes: int = _setting(
        25 * MIB, "Largest request body.", unit="bytes", aliases=("PAYLOAD_LIMIT",), low=1024, high=100 * MIB
    )
    api_key_file: str | None = _setting(
        None,
        "File whose first line is the key clients must send as `Authorization: Bearer`.",
        pattern=r"/.*",
        rule="an absolute path",
    )
    lockdown: str = _setting(
        "on",
        "Once listening, have the kernel refuse every process each way out: no connection, no datagram, no "
        "name look-up. A start where that cannot be proven stops. `off` is for development.",
        choices=("on", "off"),
    )
    log_level: str = _setting(
        "info",
        "Least severe log line written. No level shows content.",
        choices=("debug", "info", "warning", "error"),
    )

    @property
    def name(self) -> str:
        """The served name: as set, or the last part of the model's path."""
        last = self.model.rstrip("/").rsplit("/", 1)[-1]
        return self.served_name or re.sub(r"[^A-Za-z0-9._-]", "-", last).lstrip("._-")[:128] or "model"


def variable(field_name: str) -> str:
    """Return the environment name of a field."""
    return PREFIX + field_name.upper()


def read(environment: Mapping[str, str]) -> tuple[Settings, tuple[str, ...]]:
    """Return the settings in `environment` and the names that were ignored; raises SettingsError."""
    fields = {variable(f.name): f for f in dataclasses.fields(Settings)}
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in fields:
            known = {known.removeprefix(PREFIX): known for known in fields}
            near = difflib.get_close_matches(name.removeprefix(PREFIX), known, 1)
            hint = f"did you mean {known[near[0]]}?" if near else "the settings reference lists every name"
            raise SettingsError(f"`{name}` is not a setting", hint)
    for name, (allowed, hint) in GUARDED.items():
        if environment.get(name, "") not in allowed:
            raise SettingsError(f"`{name}={environment[name]}` is not supported", hint)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, field in fields.items():
        rules = field.metadata
        first = (rules["first"],) if "first" in rules else ()
        for source in (*first, name, *rules.get("aliases", ())):
            if environment.get(source, "") != "":
                text = environment[source]
                if "foreign" in rules and source in rules["aliases"]:
                    text = translated(source, text, name, rules["foreign"])
                values[field.name] = parsed(source, text, field)
                sources[field.name] = source
                break
    if environment.get("SAGEMAKER_BATCH", "").lower() == "true":  # local mode writes `True`
        values.setdefault("request_deadline_s", BATCH_DEADLINE_S)
    _check_company(sources)
    settings = Settings(**values)
    _check_together(settings)
    return settings, tuple(n for n in IGNORED if environment.get(n, "") != "")


def _check_company(sources: Mapping[str, str]) -> None:
    """Raise SettingsError for a setting that another one, set or not set, leaves without effect."""
    for field in dataclasses.fields(Settings):
        source = sources.get(field.name)
        if source is None:
            continue
        for other in field.metadata.get("instead_of", ()):
            if other in sources:
                raise SettingsError(
                    f"`{source}` and `{sources[other]}` exclude each other", "set one of them"
                )
        needed = field.metadata.get("only_with")
        if needed is not None and needed not in sources:
            raise SettingsError(
                f"`{source}` has no effect without `{variable(needed)}`", "set both, or neither"
            )


def _check_together(settings: Settings) -> None:
    if settings.allow_plaintext == "on":
        for name in ("key", "vendor_roots", "customer_roots", "state_dir"):
            if getattr(settings, name) is not None:
                raise SettingsError(
                    f"`{variable('allow_plaintext')}=on` contradicts `{variable(name)}`",
                    "a sealed package needs no leave to serve plain files: unset one of the two",
                )
    longest, prompt = settings.max_sequence_tokens, settings.max_input_tokens
    if longest is not None and prompt is not None and prompt >= longest:
        raise SettingsError(
            f"`{variable('max_input_tokens')}={prompt}` leaves no room for output",
            f"it must be less than `{variable('max_sequence_tokens')}`, which is {longest}",
        )


def encode(settings: Settings) -> str:
    """Return `settings` as one line of JSON, for a child process."""
    return json.dumps(dataclasses.asdict(settings), separators=(",", ":"))


def decode(text: str) -> Settings:
    """Return the settings encoded in `text`; raises TypeError on unknown fields."""
    return Settings(**json.loads(text))
