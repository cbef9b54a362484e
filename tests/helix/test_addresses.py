"""What addresses look like where somebody may read them."""

import pytest

from helix.addresses import shown_uri, without_secrets

ADDRESSES = {
    "http://user:pa/SECRET@host:5000/x": "http://host:5000/x",
    "http://user:SECRET PW@host": "http://host",
    "http://user:SECRET%20PW@host": "http://host",
    "http://user:p@SECRET@host": "http://host",
    "http://user:p?SECRET@host": "http://***",
    "postgresql://h/db?user=u&password=SECRET": "postgresql://h/db",
    "https://host/x?token=SECRET": "https://host/x",
    "https://host?X-Amz-Signature=SECRET#a": "https://host",
    "sqlite:////a/b@c.db": "sqlite:////a/b@c.db",
    "http://127.0.0.1:5000": "http://127.0.0.1:5000",
}


@pytest.mark.parametrize(("uri", "shown"), ADDRESSES.items())
def test_an_address_is_shown_without_what_is_secret_in_it(uri: str, shown: str):
    assert shown_uri(uri) == shown
    apart = uri.partition("://")[2]
    told = without_secrets(f"Failed: {uri}/api/2.0, url: /{apart}, {apart.replace(' ', '%20')} (no answer)", uri)
    assert "SECRET" not in told
    assert told.startswith(f"Failed: {shown}/api") and told.endswith("(no answer)")


def test_addresses_in_a_text_about_something_else_are_shown_without_secrets_too():
    assert without_secrets("https://me:secret@mlflow.example:5000/x") == "https://mlflow.example:5000/x"
    assert without_secrets("sqlite:////a/b.db") == "sqlite:////a/b.db"
    for uri in ADDRESSES.keys() - {"http://user:SECRET PW@host"}:
        assert "SECRET" not in without_secrets(f"cannot open {uri} (no answer)")
    assert without_secrets("see http://host/x, or ask me@host") == "see http://host/x, or ask me@host"
