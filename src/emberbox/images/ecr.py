"""The password of Amazon's registry (ECR), which access keys are exchanged for.

One signed call (Signature Version 4, as AWS documents it); their library for it is larger than Emberbox.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime

from emberbox.images.credentials import Credentials
from emberbox.images.errors import ImageError

_SECONDS = 20.0
_TARGET = "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken"
_REGION = re.compile(r"[a-z]{2}(-[a-z]+)+-[0-9]")


async def ecr_login(credentials: Credentials) -> tuple[str, str]:
    """Exchange access keys for a user name and a password.

    Raises:
        ImageError: the keys are refused, or AWS cannot be reached.
    """
    region = credentials.aws_region
    if not _REGION.fullmatch(region):
        raise ImageError(f"'{region[:40]}' is not a region of AWS such as 'us-west-2'")
    return await asyncio.to_thread(_exchange, credentials, f"api.ecr.{region}.amazonaws.com")


def _exchange(credentials: Credentials, host: str) -> tuple[str, str]:
    body = b"{}"
    headers = {"content-type": "application/x-amz-json-1.1", "host": host, "x-amz-target": _TARGET}
    signed = sign(
        "POST",
        "/",
        headers,
        body,
        key_id=credentials.aws_access_key_id,
        secret=credentials.aws_secret_access_key,
        region=credentials.aws_region,
        service="ecr",
        now=datetime.now(UTC),
    )
    request = urllib.request.Request(f"https://{host}/", data=body, headers=dict(signed), method="POST")
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            found = json.load(answer)
        token = base64.b64decode(found["authorizationData"][0]["authorizationToken"]).decode()
    except urllib.error.HTTPError as error:
        raise ImageError(f"AWS refused the access keys ({error.code}); check them and their region") from None
    except OSError as error:
        raise ImageError(f"AWS cannot be reached at {host} to exchange the access keys: {error}") from None
    except (ValueError, KeyError, IndexError):
        raise ImageError(f"{host} gave no password for the access keys") from None
    username, _, password = token.partition(":")
    return username, password


def sign(
    method: str,
    path: str,
    headers: Mapping[str, str],
    body: bytes,
    *,
    key_id: str,
    secret: str,
    region: str,
    service: str,
    now: datetime,
    query: str = "",
) -> dict[str, str]:
    """The headers with AWS's signature (Version 4).

    Args:
        headers: with lower-case names, `host` among them.
        query: as it is sent, its names in order.
    """
    stamp, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
    all_headers = {**headers, "x-amz-date": stamp}
    names = ";".join(sorted(all_headers))
    canonical = "\n".join(
        [
            method,
            path,
            query,
            *(f"{name}:{all_headers[name].strip()}" for name in sorted(all_headers)),
            "",
            names,
            hashlib.sha256(body).hexdigest(),
        ]
    )
    scope = f"{day}/{region}/{service}/aws4_request"
    text = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = f"AWS4{secret}".encode()
    for word in (day, region, service, "aws4_request"):
        key = hmac.digest(key, word.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    value = f"AWS4-HMAC-SHA256 Credential={key_id}/{scope}, SignedHeaders={names}, Signature={signature}"
    return {**all_headers, "authorization": value}
