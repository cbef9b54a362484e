"""The policies let storage do its work and nothing else: an IAM that enforces them, moto's, is asked."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError
from moto import mock_aws
from moto.core import DEFAULT_ACCOUNT_ID, set_initial_no_auth_action_count

from helix.storage_s3 import PERMISSIONS
from tests.cluster.validators import CLUSTER

POLICIES = CLUSTER / "policies"
PLACEHOLDER_BUCKET, PLACEHOLDER_ACCOUNT = "example-helix", "111122223333"


def load(name: str) -> dict:
    return json.loads((POLICIES / f"{name}.json").read_text())


def actions(statement: dict) -> list[str]:
    found = statement["Action"]
    return [found] if isinstance(found, str) else found


def resources(statement: dict) -> list[str]:
    found = statement["Resource"]
    return [found] if isinstance(found, str) else found


ROLES = ("storage", "ray-token", "head", "session-manager", "mlflow")
#: Actions for which AWS knows no narrower resource than all: looking at EC2, and the channels of Session Manager.
OF_EVERYTHING = r"ec2:Describe\w+|ssm:UpdateInstanceInformation|ssmmessages:(Create|Open)(Control|Data)Channel"


@pytest.mark.parametrize("name", ROLES)
def test_no_policy_allows_everything_of_anything(name: str):
    for statement in load(name)["Statement"]:
        assert statement["Effect"] == "Allow" and "NotAction" not in statement and "NotResource" not in statement
        assert not [action for action in actions(statement) if "*" in action]
        if "*" in resources(statement):
            assert all(re.fullmatch(OF_EVERYTHING, action) for action in actions(statement))


@pytest.mark.parametrize("name", ROLES)
def test_iam_takes_the_policy(name: str):
    with mock_aws():
        client = boto3.client("iam", region_name="us-east-1")
        client.create_policy(PolicyName=name, PolicyDocument=(POLICIES / f"{name}.json").read_text())
        role = client.create_role(RoleName="r", AssumeRolePolicyDocument=(POLICIES / "ec2-trust.json").read_text())
        assert role["Role"]["Arn"]
        with pytest.raises(ClientError, match="MalformedPolicyDocument"):
            client.create_policy(PolicyName="bad", PolicyDocument=json.dumps({"Statement": [{"Effect": "Perhaps"}]}))


def test_storage_is_granted_what_it_uses_and_no_action_more():
    used = set(re.findall(r"s3:\w+", " ".join(PERMISSIONS.values())))
    used |= {"s3:ListBucketMultipartUploads"}  # what a restart leaves is freed with the folder
    granted = {action for statement in load("storage")["Statement"] for action in actions(statement)}
    assert granted == used


def test_every_policy_is_looked_at_and_given_to_somebody():
    assert {path.stem for path in POLICIES.iterdir()} == {*ROLES, "ec2-trust"}
    readmes = "".join(path.read_text() for path in CLUSTER.rglob("README.md"))
    given = set(re.findall(r"policies/([\w-]+)\.json", readmes))
    given |= {word for line in re.findall(r"for policy in (.*); do", readmes) for word in line.split()}
    assert {*ROLES, "ec2-trust"} <= given


def test_code_that_jobs_run_is_written_by_no_machine():
    for name in ROLES:
        for statement in load(name)["Statement"]:
            if any(action in ("s3:PutObject", "s3:DeleteObject") for action in actions(statement)):
                assert all(re.search(r":::[\w-]+/(helix|mlflow)/\*$", found) for found in resources(statement))


def test_a_head_starts_the_machines_of_the_cluster_file_and_no_others():
    types = yaml.safe_load((CLUSTER / "aws.yaml").read_text())["available_node_types"]
    workers = {entry["node_config"]["InstanceType"] for name, entry in types.items() if name != "head"}
    (start,) = [entry for entry in load("head")["Statement"] if entry["Sid"] == "StartMachinesOfThisClusterOnly"]
    assert set(start["Condition"]["StringEquals"]["ec2:InstanceType"]) == workers
    (give,) = [entry for entry in load("head")["Statement"] if "iam:PassRole" in actions(entry)]
    assert resources(give) == [f"arn:aws:iam::{PLACEHOLDER_ACCOUNT}:role/helix-worker"]


@pytest.fixture
def as_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """From here on, every call is that of somebody who has policies/storage.json and nothing else."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mock_aws():
        for bucket in (PLACEHOLDER_BUCKET, "another-bucket"):
            client = boto3.client("s3")
            client.create_bucket(Bucket=bucket)
            for key in ("helix/there", "code/helix.zip", "private/there"):
                client.put_object(Bucket=bucket, Key=key, Body=b"x")
        iam = boto3.client("iam")
        iam.create_user(UserName="worker")
        document = (POLICIES / "storage.json").read_text().replace(PLACEHOLDER_ACCOUNT, DEFAULT_ACCOUNT_ID)
        iam.put_user_policy(UserName="worker", PolicyName="storage", PolicyDocument=document)
        key = iam.create_access_key(UserName="worker")["AccessKey"]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        boto3.setup_default_session()
        yield


@set_initial_no_auth_action_count(0)
def test_a_worker_may_what_storage_needs_and_not_more(as_worker: None):
    client = boto3.client("s3")
    client.put_object(Bucket=PLACEHOLDER_BUCKET, Key="helix/new", Body=b"y")
    assert client.get_object(Bucket=PLACEHOLDER_BUCKET, Key="helix/new")["Body"].read() == b"y"
    assert client.list_objects_v2(Bucket=PLACEHOLDER_BUCKET, Prefix="helix/")["KeyCount"] == 2
    client.delete_object(Bucket=PLACEHOLDER_BUCKET, Key="helix/new")
    assert client.get_object(Bucket=PLACEHOLDER_BUCKET, Key="code/helix.zip")["Body"].read() == b"x"
    refused: tuple[Callable[[], object], ...] = (
        lambda: client.put_object(Bucket=PLACEHOLDER_BUCKET, Key="code/helix.zip", Body=b"evil"),
        lambda: client.delete_object(Bucket=PLACEHOLDER_BUCKET, Key="code/helix.zip"),
        lambda: client.get_object(Bucket=PLACEHOLDER_BUCKET, Key="private/there"),
        lambda: client.put_object(Bucket=PLACEHOLDER_BUCKET, Key="private/there", Body=b"evil"),
        lambda: client.get_object(Bucket="another-bucket", Key="helix/there"),
        lambda: client.list_objects_v2(Bucket="another-bucket"),
        lambda: client.put_bucket_policy(Bucket=PLACEHOLDER_BUCKET, Policy="{}"),
        lambda: client.delete_bucket(Bucket=PLACEHOLDER_BUCKET),
        lambda: client.list_buckets(),
    )
    for number, call in enumerate(refused):
        with pytest.raises(ClientError, match="AccessDenied") as error:
            call()
        assert error.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403, number
