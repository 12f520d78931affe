"""`strongroom token`: a bearer token for the OpenAI route, from local or from the caller's own keys.

Owns: where the keys come from. Must not know: how tokens are made (infra.emulator.tokens does).
Invariant: keys are read once, as one snapshot, and never shown.
"""

from __future__ import annotations

import time

from infra.emulator import LOCAL_KEYS, LOCAL_REGION, tokens
from infra.emulator.sigv4 import Keys
from infra.report import CommandError, ExitCode, Result


def make(local: bool, region: str | None, expires_s: int) -> Result:
    """Return a token and its life; raises CommandError when keys or region are missing."""
    keys, chosen = (LOCAL_KEYS, region or LOCAL_REGION) if local else _own(region)
    try:
        token = tokens.make(keys, chosen, expires_s, time.time())
    except ValueError as error:
        raise CommandError(ExitCode.USAGE, "bad_argument", str(error)) from error
    return {"token": token, "region": chosen, "expires_s": expires_s}


def _own(region: str | None) -> tuple[Keys, str]:
    try:
        import botocore.session
        from botocore.exceptions import BotoCoreError
    except ModuleNotFoundError as error:
        raise missing_sdk() from error
    session = botocore.session.get_session()
    chosen = region or session.get_config_variable("region")
    if not chosen:
        raise CommandError(ExitCode.ENVIRONMENT_MISSING, "no_region", "no region is set", "pass --region")
    try:
        credentials = session.get_credentials()
        # One snapshot: a refresh between two reads would mix the parts of two keys.
        frozen = credentials.get_frozen_credentials() if credentials else None
    except BotoCoreError as error:
        raise no_credentials() from error
    if frozen is None:
        raise no_credentials()
    return Keys(frozen.access_key, frozen.secret_key, frozen.token), chosen


def no_credentials() -> CommandError:
    """Return the error for a machine without usable AWS keys."""
    hint = "sign in to AWS, or use the emulator's own keys"
    return CommandError(ExitCode.ENVIRONMENT_MISSING, "no_credentials", "no AWS credentials were found", hint)


def missing_sdk() -> CommandError:
    """Return the error for an installation without the AWS SDK."""
    hint = "install strongroom[deploy]"
    return CommandError(ExitCode.ENVIRONMENT_MISSING, "no_boto3", "boto3 is not installed", hint)
