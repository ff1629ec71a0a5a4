"""URLs that servers name, in redirects and challenges: who is asked, as urllib3 reads them.

Parsers differ in what they make of ``http://one\\@other/``, and credentials must not go where one parser says because
another one has checked them. So there is only urllib3's, which makes the connection, too, and what may be read in two
ways is refused.
"""

import re
from typing import NamedTuple
from urllib.parse import urljoin

from urllib3.util import parse_url

_AMBIGUOUS = re.compile(r"[\\\s\x00-\x20\x7f-\x9f]")
_PORTS = {"http": 80, "https": 443}


class Origin(NamedTuple):
    """A server. *host* is in lower case, an IPv6 address in brackets."""

    scheme: str
    host: str
    port: int


def origin(url: str) -> Origin:
    """The server that *url* leads to; ValueError for all but http and https URLs, and for those with a user in them."""
    if _AMBIGUOUS.search(url):
        raise ValueError("a backslash, a space or a control character in a URL")
    parts = parse_url(url)
    if parts.scheme not in _PORTS or not parts.host or parts.auth is not None or parts.port == 0:
        raise ValueError("no http URL of a server")
    return Origin(parts.scheme, parts.host, parts.port or _PORTS[parts.scheme])


def joined(url: str, reference: str) -> str:
    """What *reference*, which may be relative to *url*, means. Raises ValueError as :func:`origin` does."""
    if _AMBIGUOUS.search(reference):  # urljoin would drop some of them
        raise ValueError("a backslash, a space or a control character in a URL")
    target = urljoin(url, reference)
    origin(target)
    return target
