"""Pages: an opaque `nextToken` in, an `x-next-token` header out.

A token is the position of the last item shown, so pages neither repeat nor skip what was there throughout.
"""

from __future__ import annotations

import base64
import json
from typing import Annotated

from fastapi import Query

from emberbox.api.fields import storable
from emberbox.control.errors import Invalid

NEXT_TOKEN_HEADER = "X-Next-Token"

Limit = Annotated[int, Query(ge=1, le=100, description="Maximum number of items to return per page")]
NextToken = Annotated[str | None, Query(max_length=512, description="Cursor to start the list from")]

Position = tuple[int, str]


def encode(position: Position) -> str:
    packed = json.dumps([position[0], position[1]], separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(packed).decode().rstrip("=")


def decode(token: str | None) -> Position | None:
    """The position that a token stands for; None without one.

    Raises:
        Invalid: the token is not one of ours.
    """
    if not token:
        return None
    try:
        number, text = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
        if type(number) is not int or type(text) is not str or not 0 <= number < 2**53:
            raise ValueError("it is not a number and a text")
        return number, storable(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise Invalid("nextToken is not valid; use the x-next-token header of the page before") from error
