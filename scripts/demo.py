"""The demo: a real instruct model, sealed and served through the SageMaker contract to a real boto3 client.

Owns: the story told on the terminal and the JSON document at its end.
Must not know: anything but the endpoint's URL once it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.emulator.server import Emulator
from scripts.demo_model import ensure_checkpoint
from scripts.demo_package import Sealed, ensure_ready, sealed
from scripts.endpoint import ROOT, Endpoint
from scripts.progress import progress, say

CACHE = ROOT / ".cache" / "models"
QUESTION = "What is the capital of France?"
STORY = "Write three sentences about the sea."
STREAM_TOKENS = 96


def chat(question: str, **fields: Any) -> bytes:
    """Return an OpenAI chat body for `question`."""
    return json.dumps(
        {"messages": [{"role": "user", "content": question}], "temperature": 0, **fields}
    ).encode()


def ask(client: Any, name: str) -> dict[str, Any]:
    """Return reply, usage and seconds of one `invoke_endpoint` call."""
    began = time.monotonic()
    answer = client.invoke_endpoint(
        EndpointName=name, ContentType="application/json", Body=chat(QUESTION, max_tokens=64)
    )
    document = json.loads(answer["Body"].read())
    return {
        "question": QUESTION,
        "reply": document["choices"][0]["message"]["content"],
        "usage": document["usage"],
        "seconds": round(time.monotonic() - began, 3),
    }


def stream(client: Any, name: str) -> dict[str, Any]:
    """Return timing of one `invoke_endpoint_with_response_stream` call, part by part."""
    began = time.monotonic()
    body = chat(STORY, max_tokens=STREAM_TOKENS, stream=True, stream_options={"include_usage": True})
    answer = client.invoke_endpoint_with_response_stream(
        EndpointName=name, ContentType="application/json", Body=body
    )
    arrivals: list[float] = []
    raw = b""
    for part in answer["Body"]:
        arrivals.append(time.monotonic() - began)
        raw += part["PayloadPart"]["Bytes"]
    events = [line[6:] for line in raw.decode().splitlines() if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        raise RuntimeError("the stream did not end with [DONE]")
    chunks = [json.loads(event) for event in events[:-1]]
    tokens = chunks[-1]["usage"]["completion_tokens"]
    spoken = arrivals[-1] - arrivals[0]
    if tokens < 2 or spoken <= 0:
        raise RuntimeError("the stream was too short to time")
    return {
        "streamed_parts": len(arrivals),
        "completion_tokens": tokens,
        "time_to_first_token_s": round(arrivals[0], 3),
        "last_part_s": round(arrivals[-1], 3),
        "tokens_per_s": round((tokens - 1) / spoken, 1),
    }


def calls(upstream: str) -> dict[str, Any]:
    """Put the local runtime in front of `upstream`, make both calls and return what they gave."""
    with Emulator(upstream=upstream, endpoint="demo") as runtime:
        import boto3

        client = boto3.client("sagemaker-runtime", **runtime.boto3_arguments())
        say(f"boto3 invoke_endpoint: {QUESTION}")
        answer = ask(client, "demo")
        say(f"reply: {answer['reply']}")
        say("boto3 invoke_endpoint_with_response_stream")
        return {**answer, **stream(client, "demo")}


def sound(given: dict[str, Any]) -> bool:
    """Return whether the answer is right and the stream was one."""
    return "Paris" in given["reply"] and given["time_to_first_token_s"] < given["last_part_s"]


@contextlib.contextmanager
def packed(model_dir: Path) -> Iterator[Sealed]:
    """Yield the model as a sealed package, which goes afterwards."""
    with contextlib.ExitStack() as stack:
        with progress("sealing the model") as told:
            ready = ensure_ready(model_dir, told)
            package = stack.enter_context(sealed(ready, "smollm2-135m-instruct", told))
        megabytes = package.sealed_bytes / 1e6
        say(f"{megabytes:.0f} MB: {package.sealed_s:.1f} s to seal, {package.verified_s:.1f} s to verify")
        yield package


def timing(package: Sealed) -> dict[str, Any]:
    """Return how long sealing and verifying took, for the report."""
    return {"seal_s": round(package.sealed_s, 2), "verify_s": round(package.verified_s, 2)}


def in_the_image(model_dir: Path, tag: str, *, plain: bool) -> tuple[bool, dict[str, Any]]:
    """Serve with the image, sealed unless `plain`; return whether all went well, and the report."""
    from scripts import demo_image

    if plain:
        return demo_image.in_the_image(demo_image.Model(model_dir), tag, calls, sound)
    with packed(model_dir) as package:
        given = demo_image.Model(package.path, package.key, package.environment)
        ok, report = demo_image.in_the_image(given, tag, calls, sound)
        return ok, {**timing(package), **report}


def on_this_machine(model_dir: Path, *, plain: bool) -> tuple[bool, dict[str, Any]]:
    """Serve with this checkout, sealed unless `plain`; return whether all went well, and the report."""
    environment: dict[str, str] = {}
    facts: dict[str, Any] = {"sealed": not plain}
    with contextlib.ExitStack() as stack:
        if not plain:
            package = stack.enter_context(packed(model_dir))
            model_dir, environment = package.path, package.environment
            facts |= timing(package)
        say("starting the server")
        endpoint = stack.enter_context(Endpoint(model_dir, environment=environment, progress=say))
        say(f"healthy after {endpoint.start_s:.1f} s; putting the local SageMaker runtime in front of it")
        given = calls(endpoint.upstream)
        stopped = endpoint.stop()
    return sound(given) and stopped == 0, {
        **facts,
        **given,
        "start_s": round(endpoint.start_s, 2),
        "server_exit": stopped,
    }


def main() -> int:
    """Run the demo; the last line of stdout is one JSON document."""
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the converted checkpoint is kept")
    parser.add_argument("--plain", action="store_true", help="serve the checkpoint as it is, not sealed")
    parser.add_argument(
        "--image",
        nargs="?",
        const="",
        metavar="TAG",
        help="serve the checkpoint with the hardened image; without a tag it is built where it is missing",
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what it made goes with it
    began = time.monotonic()
    say("the model is SmolLM2-135M-Instruct (Apache-2.0), carried by an installed package")
    with progress("preparing the model") as told:
        model_dir = ensure_checkpoint(options.cache, told)
    if options.image is None:
        ok, report = on_this_machine(model_dir, plain=options.plain)
    else:
        from scripts import demo_image

        try:
            ok, report = in_the_image(model_dir, options.image, plain=options.plain)
        except demo_image.FAILURES as error:
            print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
            return 3
    report = {
        "ok": ok,
        "model": "SmolLM2-135M-Instruct",
        **report,
        "total_s": round(time.monotonic() - began, 1),
    }
    print(json.dumps(report, ensure_ascii=False, separators=(",", ":")))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
