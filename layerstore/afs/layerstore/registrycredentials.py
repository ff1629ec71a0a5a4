"""Credentials from Docker's configuration file, and from the credential helpers that it names.

The file is ``~/.docker/config.json`` as ``docker login`` writes it; helpers speak the protocol of
docker-credential-helpers: ``docker-credential-NAME get`` with the server on stdin. For a registry the helper in
``credHelpers`` is asked, else the one in ``credsStore``; ``auths`` counts if there is none or it knows nothing.

The file is read each time that a registry asks for credentials, so a new login counts at once.
"""

import base64
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from afs.core.errors import DeadlineExceeded
from afs.core.run import ask
from afs.layerstore.errors import RegistryMisconfigured

_HUB = "https://index.docker.io/v1/"  # what docker login calls it
_HUB_NAMES = ("docker.io", "index.docker.io", "registry-1.docker.io")
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HELPER_TIMEOUT_S = 30.0  # one may ask a cloud's API; a user cannot be asked here


@dataclass(frozen=True, slots=True, repr=False)
class Credentials:
    """One of: *username* with *password*; *identity_token*, which buys tokens; *registry_token*, which is one."""

    username: str = ""
    password: str = ""
    identity_token: str = ""
    registry_token: str = ""

    @property
    def basic(self) -> str:
        """The value of an Authorization header, or "" without a name."""
        if not self.username:
            return ""
        return f"Basic {base64.b64encode(f'{self.username}:{self.password}'.encode()).decode()}"


NONE = Credentials()


@dataclass(frozen=True, slots=True)
class CredentialFile:
    """Docker's configuration file, which may be missing. *helper_timeout* is in seconds."""

    path: Path | None
    helper_timeout: float = field(default=_HELPER_TIMEOUT_S)

    def find(self, netloc: str) -> Credentials:
        """Credentials for the server *netloc* (``host[:port]``), or ``NONE``; blocking. Raises RegistryMisconfigured."""
        document = self._read(netloc)
        names = (_HUB, *_HUB_NAMES) if netloc in _HUB_NAMES else (netloc,)
        helper = self._helper(document, netloc, names)
        found = self._ask(helper, netloc, names[0]) if helper else None
        return found or self._from_auths(document, netloc, names)

    def _read(self, netloc: str) -> dict[str, Any]:
        if self.path is None:
            return {}
        try:
            document = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise self._wrong(netloc, f"cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise self._wrong(netloc, f"is not JSON: {error}") from None
        if not isinstance(document, dict):
            raise self._wrong(netloc, "is not a JSON object")
        return document

    def _table(self, document: dict[str, Any], key: str, netloc: str) -> dict[str, Any]:
        value = document.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self._wrong(netloc, f"has a {key!r} that is not an object")
        return value

    # Helpers

    def _helper(self, document: dict[str, Any], netloc: str, names: tuple[str, ...]) -> str:
        helpers = self._table(document, "credHelpers", netloc)
        helper = next((helpers[name] for name in names if name in helpers), document.get("credsStore") or "")
        if helper and (not isinstance(helper, str) or not _HELPER_NAME.fullmatch(helper)):
            raise self._wrong(netloc, f"names {helper!r}, which is no credential helper")
        return str(helper)

    def _ask(self, helper: str, netloc: str, server: str) -> Credentials | None:
        """What the helper has, None if it has nothing."""
        program = f"docker-credential-{helper}"
        try:
            answer = ask([program, "get"], stdin=server.encode(), timeout=self.helper_timeout)
        except FileNotFoundError:
            raise self._wrong(netloc, f"names the credential helper {program}, which is not on PATH") from None
        except (OSError, DeadlineExceeded) as error:
            cause = error.line if isinstance(error, DeadlineExceeded) else f"{program}: {error.strerror}"
            raise self._wrong(netloc, f"names a credential helper that failed: {cause}") from None
        said = (answer.stdout.strip() or answer.stderr.strip())[:200].decode(errors="replace")
        if answer.returncode:
            if "credentials not found" in said:  # credentials.NewErrCredentialsNotFound there
                return None
            status = f"status {answer.returncode}: {said or 'no message'}"
            raise self._wrong(netloc, f"names a credential helper that failed: {program}: {status}")
        try:
            document = json.loads(answer.stdout)
            name, secret = str(document["Username"]), str(document["Secret"])
        except (ValueError, KeyError, TypeError, RecursionError):
            # Not what it said: there may be a secret in it.
            raise self._wrong(
                netloc, f"names a credential helper whose answer has no Username and Secret: {program}"
            ) from None
        if not _is_text(name + secret):
            raise self._wrong(netloc, f"names a credential helper whose answer is no text: {program}")
        if name == "<token>":
            return Credentials(identity_token=secret)
        return Credentials(name, secret)

    # auths

    def _from_auths(self, document: dict[str, Any], netloc: str, names: tuple[str, ...]) -> Credentials:
        auths = self._table(document, "auths", netloc)
        entry = next((auths[name] for name in names if name in auths), None)
        if entry is None:  # old files have URLs as keys
            entry = next((value for key, value in auths.items() if _host_name(key) in names), {})
        keys = ("username", "password", "auth", "identitytoken", "registrytoken")
        values: list[Any] = [entry.get(key) or "" for key in keys] if isinstance(entry, dict) else [None]
        if not all(isinstance(value, str) and _is_text(value) for value in values):
            raise self._wrong(netloc, f"has an entry for {netloc} that is not an object of strings")
        name, password, auth, identity_token, registry_token = values
        if auth:
            try:
                name, colon, password = base64.b64decode(auth, validate=True).decode().partition(":")
            except ValueError:  # binascii.Error, UnicodeDecodeError and what b64decode says of other than ASCII
                colon = ""
            if not colon:
                raise self._wrong(netloc, f"has an 'auth' for {netloc} that is not base64 of NAME:PASSWORD")
        if not (registry_token.isascii() and registry_token.isprintable()):
            raise self._wrong(netloc, f"has a 'registrytoken' for {netloc} that no header can hold")
        # Docker's Go client pads some passwords with zero bytes.
        return Credentials(name, password.strip("\0"), identity_token, registry_token)

    def _wrong(self, netloc: str, cause: str) -> RegistryMisconfigured:
        return RegistryMisconfigured(netloc, f"{self.path} {cause}")


def _is_text(value: str) -> bool:
    """Whether UTF-8 can say *value*: JSON can hold lone surrogates."""
    return value.encode("utf-8", "replace") == value.encode("utf-8", "surrogatepass")


def _host_name(key: str) -> str:
    """The ``host[:port]`` in a key of ``auths``, which may be a URL."""
    try:
        return urlsplit(key).netloc if "://" in key else key.partition("/")[0]
    except ValueError:
        return ""
