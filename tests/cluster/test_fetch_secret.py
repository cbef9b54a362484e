"""A secret goes from Systems Manager into a file that its owner alone may read, and is shown nowhere."""

import os
import stat
from pathlib import Path

import boto3
import pytest

from cluster.fetch_secret import main

VALUE = "a-token-of-enough-characters"


@pytest.fixture
def ssm(s3_address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL_S3"])
    client = boto3.client("ssm")
    client.put_parameter(Name="/test/secret", Value=VALUE + "\n", Type="SecureString", Overwrite=True)
    return client


def test_the_file_is_its_owners_alone_whatever_the_umask(ssm, tmp_path: Path):
    file = tmp_path / "folder" / "secret"
    before = os.umask(0)
    try:
        assert main(["/test/secret", str(file)]) == 0
    finally:
        os.umask(before)
    assert file.read_text() == VALUE
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_a_new_secret_replaces_the_old_one_whole_and_leaves_nothing_beside_it(ssm, tmp_path: Path):
    file = tmp_path / "secret"
    file.write_text("an old and much longer value that anyone could read")
    file.chmod(0o644)
    assert main(["/test/secret", str(file)]) == 0
    assert file.read_text() == VALUE and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        ("String", VALUE, "stored in the open"),
        ("SecureString", "short", "16 or more"),
        (None, "", "ssm:GetParameter"),
    ],
)
def test_what_is_no_secret_is_refused_and_never_shown(
    ssm, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str | None, value: str, said: str
):
    ssm.delete_parameter(Name="/test/secret")
    if kind is not None:
        ssm.put_parameter(Name="/test/secret", Value=value, Type=kind)
    assert main(["/test/secret", str(tmp_path / "secret")]) == 1
    shown = "".join(capfd.readouterr())
    assert said in shown and "/test/secret" in shown and (not value or value not in shown)
    assert list(tmp_path.glob("secret*")) == []


def test_the_secret_is_not_printed(ssm, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert main(["/test/secret", str(tmp_path / "secret")]) == 0
    assert "".join(capfd.readouterr()) == ""
