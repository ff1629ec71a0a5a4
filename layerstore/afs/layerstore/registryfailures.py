"""What goes wrong with a request, in one line for an operator and without secrets."""

import re
import ssl
from typing import cast
from urllib.parse import urlsplit

from urllib3.exceptions import NewConnectionError, ProxyError

# What servers say to a client without a certificate, or with one that they do not trust; Go's say the second.
_CLIENT_ALERTS = ("CERTIFICATE_REQUIRED", "ALERT_BAD_CERTIFICATE", "ALERT_UNKNOWN_CA")


class RequestFailed(Exception):
    """No answer. *cause* is one line without secrets; *again* tells whether another try may help."""

    def __init__(self, cause: str, *, again: bool = True) -> None:
        self.cause, self.again = cause, again
        super().__init__(cause)


class NoTls(RequestFailed):
    """The server does not speak TLS."""


def without_query(url: str) -> str:
    """*url* for people: queries of redirects hold signatures, and there may be a password before the host."""
    return re.sub(r"//[^/]*@", "//", url.partition("?")[0])


def shown(proxy: str) -> str:
    """A proxy's URL without the credentials in it."""
    parts = urlsplit(proxy)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _chain(error: BaseException) -> list[BaseException]:
    """*error* and what urllib3 wrapped in it, the innermost last."""
    found = [error]
    while (inner := _inner(found[-1])) is not None:
        found.append(inner)
    return found


def _inner(error: BaseException) -> BaseException | None:
    if isinstance(error, ProxyError):
        return error.original_error
    inner = [getattr(error, "reason", None), error.__cause__, *reversed(error.args)]
    return next((found for found in inner if isinstance(found, BaseException) and found is not error), None)


def innermost(error: BaseException) -> str:
    """The innermost reason, without urllib3's object addresses."""
    error = _chain(error)[-1]
    text = str(error)
    if "object at 0x" in text or "Connection(" in text or "host=" in text:
        text = text.partition(": ")[2] or text
    return " ".join(text.split()) or type(error).__name__


def failure(error: Exception, netloc: str, scheme: str, url: str, proxy: str) -> RequestFailed:
    """What *error* means to an operator."""
    chain = _chain(error)
    cause, through = innermost(error), f" (through proxy {shown(proxy)})" if proxy else ""
    asked = urlsplit(url).netloc
    where = "" if asked == netloc else f"{asked}: "
    tls = next((one for one in chain if isinstance(one, ssl.SSLError)), None)
    if isinstance(tls, ssl.SSLCertVerificationError):
        cause = (
            f"{where}its certificate is not trusted: {tls.verify_message or cause}{through}; trust its authority with "
            f"--registry-ca FILE, or with ca in the hosts.toml of --registry-config, or see --insecure-registry"
        )
        return RequestFailed(cause, again=False)
    if tls is not None and _is_no_tls(tls):
        return NoTls(f"{where}it does not speak TLS{through}; if it is to be so, see --plain-http", again=False)
    if tls is not None and any(alert in (tls.reason or "") for alert in _CLIENT_ALERTS):
        cause = f"{where}it wants a client certificate that it knows{through}; give it as client in hosts.toml"
        return RequestFailed(cause, again=False)
    if tls is not None and (isinstance(tls, ssl.SSLEOFError) or "HANDSHAKE_FAILURE" in (tls.reason or "")):
        # TLS 1.2 has no alert of its own for that, and that of TLS 1.3 may come too late to be seen.
        cause = (
            f"{where}it breaks TLS off{through}; perhaps it wants a client certificate (client in hosts.toml): {cause}"
        )
        return RequestFailed(cause)
    refused = any(isinstance(one, NewConnectionError) for one in chain) and not proxy
    if refused and scheme == "either" and urlsplit(url).scheme == "https" and urlsplit(url).port is None:
        return NoTls(f"{where}{cause}")  # nobody at port 443: perhaps at 80
    again = not (proxy and "407" in cause)
    return RequestFailed(f"{where}{cause}{through}", again=again)


def _is_no_tls(error: ssl.SSLError) -> bool:
    # What a server that expects a request line answers is no TLS record: the names differ between OpenSSL's versions.
    reasons = (
        "WRONG_VERSION_NUMBER",
        "HTTP_REQUEST",
        "UNKNOWN_PROTOCOL",
        "RECORD_LAYER_FAILURE",
        "PACKET_LENGTH_TOO_LONG",
    )
    return cast("str | None", error.reason) in reasons
