"""Addresses as they may be shown: in logs, errors and reports, without users, passwords and secret query values."""

import re
from urllib.parse import quote, unquote

#: What stands for a secret, and a key of a query with a value that is one.
MASK = "***"
SECRET_VALUE = re.compile(
    r"([?&;][\w.-]*(?:pass|pw|token|secret|key|sig|auth|cred)[\w.-]*=)([^&;#\s\"'<>]+)", re.IGNORECASE
)

#: A word of a password is masked wherever it stands from so many characters on: shorter ones are in every sentence.
WORD = 4


def without_secrets(text: str, uri: str = "") -> str:
    """An address, or a text that holds addresses, as it may be printed: without users and passwords.

    `uri`: the address that the text is about. What is secret in it is not printed either where libraries write it
    apart, quoted, or with spaces in it; in other addresses a password with a space cannot be told from the text.
    """
    if uri:
        text = text.replace(uri, shown_uri(uri))
        for secret in _secrets(uri):
            text = text.replace(secret, MASK)
    text = SECRET_VALUE.sub(rf"\g<1>{MASK}", text)
    return re.sub(r"://[^/\s]\S*@", "://", text)


def shown_uri(uri: str) -> str:
    """Scheme, host, port and path of an address; only its scheme where nobody can tell where its host begins."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri
    address, *query = re.split("[?#]", rest, maxsplit=1)
    if address.startswith("/"):  # a file: there is no host that a user could stand before
        return f"{scheme}://{address}"
    if query and "@" in query[0]:
        return f"{scheme}://{MASK}"
    return f"{scheme}://{address.rpartition('@')[2]}"


def _secrets(uri: str) -> list[str]:
    """The password of an address and the secret values of its query, in whole, in words, and quoted; longest first."""
    rest = uri.partition("://")[2]
    user, at, _ = rest.rpartition("@")
    found = {match.group(2) for match in SECRET_VALUE.finditer(rest)}
    if at and not rest.startswith("/"):
        found.add(user.partition(":")[2] or user)
    found |= {unquote(one) for one in found}
    found |= {quote(one, safe="") for one in found} | {quote(one) for one in found}
    found |= {word for one in found for word in re.split(r"\W+", one) if len(word) >= WORD}
    return sorted(filter(None, found), key=len, reverse=True)
