#!/usr/bin/env python3
"""Writes a secret of AWS Systems Manager into a file that its owner alone may read; it is shown nowhere else.

    fetch_secret.py /helix/ray-auth-token ~/.ray/auth_token

Every node of cluster/aws.yaml runs it before Ray starts, with the rights of its instance profile: no secret is in a
cluster file, in an image, or in the arguments of a process.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import boto3
from botocore.exceptions import BotoCoreError, ClientError

#: Whatever is shorter was mistyped or is guessed.
SHORTEST = 16


class SecretError(Exception):
    """The secret cannot be had."""


def fetch(parameter: str) -> str:
    """The value of a SecureString parameter. Raises SecretError with the parameter's name and never with its value."""
    try:
        answer = boto3.client("ssm").get_parameter(Name=parameter, WithDecryption=True)["Parameter"]
    except (BotoCoreError, ClientError) as error:
        raise SecretError(
            f"{parameter} cannot be read: {error}; make it with `aws ssm put-parameter --type SecureString`, and give "
            "the instance profile of this machine ssm:GetParameter on it"
        ) from error
    if answer["Type"] != "SecureString":
        raise SecretError(f"{parameter} is a {answer['Type']}, which is stored in the open; wanted a SecureString")
    value = answer["Value"].strip()
    if len(value) < SHORTEST:
        raise SecretError(f"{parameter} holds {len(value)} characters; wanted {SHORTEST} or more")
    return value


def write(path: Path, text: str) -> None:
    """Put the whole file in place at once, readable by its owner alone from the first byte on."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)  # mode 0600, whatever the umask
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("parameter", help="the name of a SecureString parameter")
    parser.add_argument("file", type=Path, help="where its value goes, with mode 0600")
    options = parser.parse_args(argv)
    try:
        write(options.file.expanduser(), fetch(options.parameter))
    except (SecretError, OSError) as error:
        print(f"fetch_secret: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
