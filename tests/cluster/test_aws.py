"""cluster/aws.yaml is what Ray and EC2 would take, does what its comments say, and its commands do so when run."""

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from ray._private.label_utils import validate_node_labels
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.v2.event_logger import AutoscalerEventLogger
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ResourceRequestByCount

from orchestration.money import machine_facts, read_prices
from tests.cluster.validators import CLUSTER, Document, copy_of, ec2_problems, load_all, ray_problems

#: What a driver of a pack takes on the head, and what the head takes itself: measured on Ray 2.60, GiB of memory.
DRIVER_GIB, HEAD_GIB, M6I_XLARGE_GIB = 0.9, 2.0, 16


@pytest.fixture
def config() -> Document:
    (document,) = load_all(CLUSTER / "aws.yaml")
    return document


NODE_TYPES = tuple(yaml.safe_load((CLUSTER / "aws.yaml").read_text())["available_node_types"])
WORKERS = tuple(name for name in NODE_TYPES if name != "head")
GPU_WORKERS = tuple(name for name in WORKERS if name.startswith("gpu"))


def is_spot(node_type: Document) -> bool:
    return node_type["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"


def test_ray_takes_the_file(config: Document):
    assert ray_problems(config) == []


@pytest.mark.parametrize("name", NODE_TYPES)
def test_ec2_takes_every_kind_of_machine(config: Document, name: str):
    assert ec2_problems(config["available_node_types"][name]["node_config"]) == []


def plant(path: str, value: Any) -> Callable[[Document], None]:
    def change(config: Document) -> None:
        *way, last = path.split("/")
        for step in way:
            config = config[int(step) if isinstance(config, list) else step]
        config[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("available_node_types/gpu_spot_l4/max_worker", 3),
        ("available_node_types/gpu_spot_l4/resources/GPU", 0.5),
        ("available_node_types/gpu_spot_l4/priority", "high"),
        ("head_node_type", "nobody"),
        ("idle_timeout", 5),
        ("provider/regions", "us-east-1"),
        ("auth/ssh_usr", "ubuntu"),
        ("max_workers", "many"),
    ],
)
def test_an_error_planted_in_the_file_is_found_by_rays_schema(config: Document, path: str, value: Any):
    plant(path, value)(config)
    assert ray_problems(config)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("InstanceMarketOptions/MarketTyp", "spot"),
        ("InstanceMarketOptions/MarketType", "sport"),
        ("InstanceMarketOptions/SpotOptions/InstanceInterruptionBehavior", "die"),
        ("InstanceMarketOptions/SpotOptions/SpotInstanceType", "once"),
        ("InstanceType", "g6.xlrge"),
        ("MetadataOptions/HttpTokens", "yes"),
        ("MetadataOptions/HttpPutResponseHopLimit", "1"),
        ("BlockDeviceMappings/0/Ebs/VolumeType", "gp9"),
        ("BlockDeviceMappings/0/Ebs/VolumeSize", "100"),
        ("IamInstanceProfile/Role", "helix-worker"),
        ("SecurityGroupIds", "sg-0"),
        ("SubnetIds", []),
    ],
)
def test_an_error_planted_in_a_machine_is_found_by_ec2s_shape(config: Document, path: str, value: Any):
    node_config = config["available_node_types"]["gpu_spot_l4"]["node_config"]
    plant(path, value)(node_config)
    assert ec2_problems(node_config)


# What the file promises


def test_the_head_is_on_demand_and_holds_drivers_and_no_trial(config: Document):
    head = config["available_node_types"]["head"]
    assert not is_spot(head)
    assert head["resources"]["CPU"] == 0 and "GPU" not in head["resources"]
    assert head["node_config"]["InstanceType"] == "m6i.xlarge"
    assert head["resources"]["trial_driver"] * DRIVER_GIB + HEAD_GIB <= M6I_XLARGE_GIB
    assert head["resources"]["trial_driver"] >= config["max_workers"], "every worker has room for its driver"


def test_workers_come_from_nothing_and_go_when_idle(config: Document):
    assert 0 < config["idle_timeout_minutes"] <= 15
    for name in WORKERS:
        node_type = config["available_node_types"][name]
        assert node_type["min_workers"] == 0 < node_type["max_workers"] <= config["max_workers"]
        assert 0 < node_type["idle_timeout_s"] <= 900


def test_there_are_several_spot_types_over_several_zones_and_a_tail_on_demand(config: Document):
    types = config["available_node_types"]
    spot = [types[name] for name in GPU_WORKERS if is_spot(types[name])]
    tail = [types[name] for name in GPU_WORKERS if not is_spot(types[name])]
    assert len({entry["node_config"]["InstanceType"] for entry in spot}) >= 3 and len(tail) == 1
    assert min(entry["priority"] for entry in spot) > tail[0]["priority"]
    assert len({entry["priority"] for entry in spot}) == len(spot)
    zones = config["provider"]["availability_zone"].split(",")
    assert len(zones) >= 3 and all(zone[:-1] == config["provider"]["region"] for zone in zones)
    assert all(len(entry["node_config"]["SubnetIds"]) == len(zones) for entry in types.values())


@pytest.mark.parametrize("name", NODE_TYPES)
def test_the_labels_of_a_machine_tell_the_truth_and_it_has_a_price(config: Document, name: str):
    node_type = config["available_node_types"][name]
    assert node_type["labels"] == {
        "helix/market": "spot" if is_spot(node_type) else "on-demand",
        "helix/instance-type": node_type["node_config"]["InstanceType"],
    }
    validate_node_labels(node_type["labels"])
    prices, labels = read_prices(CLUSTER / "prices.yaml"), node_type["labels"]
    told = machine_facts(held={}, resources={}, labels=labels, environment={})  # what an attempt there records
    assert prices.per_hour(told["instance_type"], told["market"]) is not None
    resources = node_type["resources"]
    assert (prices.memory_of_a_gpu(labels, resources) is not None) == bool(resources.get("GPU"))


def test_prices_are_dated_sourced_and_spot_is_the_cheaper():
    table = yaml.safe_load((CLUSTER / "prices.yaml").read_text())
    assert table["date"].isoformat() and "aws.amazon.com" in table["source"] and "estimate" in table["source"]
    for price in table["prices"].values():
        assert set(price) == {"on_demand_usd_per_hour", "spot_usd_per_hour"}
        assert 0 < price["spot_usd_per_hour"] < price["on_demand_usd_per_hour"]


def test_what_a_cluster_costs_idle_is_what_the_table_says():
    table = yaml.safe_load((CLUSTER / "prices.yaml").read_text())
    hours, standing = 730, table["standing"]
    head = table["prices"]["m6i.xlarge"]["on_demand_usd_per_hour"]
    disk, nat = 100 * standing["disk_usd_per_gib_month"], hours * standing["nat_gateway_usd_per_hour"]
    said = " ".join((CLUSTER / "README.md").read_text().split())
    assert f"the head {head} USD an hour, {head * hours:.0f} a month; its disk of 100 GiB {disk:.0f} a month" in said
    assert f"one NAT gateway {nat:.0f} a month" in said
    assert f"about **{head * hours + disk + nat:.0f} USD a month**" in said and f"noted on {table['date']}" in said
    eks = standing["eks_control_plane_usd_per_hour"]
    said = " ".join((CLUSTER / "kuberay" / "README.md").read_text().split())
    assert f"EKS {eks:.2f} USD an hour, {eks * hours:.0f} a month" in said
    assert f"about **{(eks + head) * hours:.0f} USD a month**" in said


def launched(config: Document, bundle: dict[str, float], *, failed: tuple[str, ...] = ()) -> str:
    """Which kind of machine Ray's own scheduler starts for a request, where some kinds could just not be had."""
    config = prepare_config(config)
    for node_type in config["available_node_types"].values():  # what Ray learns from EC2 of each kind
        if "GPU" in node_type["resources"]:
            node_type["resources"] |= {"memory": 12 * 2**30, f"accelerator_type:{id(node_type)}": 1}
    types = AutoscalingConfig(config, skip_content_hash=True).get_node_type_configs()
    reply = ResourceDemandScheduler(AutoscalerEventLogger(_Silent())).schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=types,
            max_num_nodes=config["max_workers"] + 1,
            resource_requests=[ResourceRequestByCount(request=ResourceRequestUtil.make(bundle), count=1)],
            recoverable_resource_availabilities=dict.fromkeys(failed, 0.0),
            cloud_resource_availabilities=dict.fromkeys(failed, 0.0),
        )
    )
    names = [request.instance_type for request in reply.to_launch if request.instance_type != "head"]
    return names[0] if len(names) == 1 else f"{names}"


class _Silent:
    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_, **__: None


def test_rays_scheduler_asks_for_spot_first_by_priority_and_for_the_tail_at_last(config: Document):
    types = config["available_node_types"]
    order = sorted(GPU_WORKERS, key=lambda name: -types[name]["priority"])
    assert not is_spot(types[order[-1]])
    for unavailable, expected in enumerate(order):
        assert launched(copy_of(config), {"GPU": 1, "CPU": 1}, failed=tuple(order[:unavailable])) == expected
        assert launched(copy_of(config), {"GPU": 1, "CPU": 4}, failed=tuple(order[:unavailable])) == expected


def test_preparing_data_starts_no_gpu(config: Document):
    assert launched(copy_of(config), {"CPU": 1}) == "cpu_spot"


# Secure by default


def test_no_machine_is_public_and_none_makes_a_group_of_its_own(config: Document):
    assert config["provider"]["use_internal_ips"] is True
    assert "start-session --region us-east-1 --target %h" in config["auth"]["ssh_proxy_command"]
    assert config["auth"]["ssh_proxy_use_node_id"] is True
    for node_type in config["available_node_types"].values():
        node_config = node_type["node_config"]
        assert node_config["SecurityGroupIds"], "Ray would make one that is open to the world on port 22"
        assert node_config["MetadataOptions"]["HttpTokens"] == "required"
        assert node_config["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
        assert all(disk["Ebs"]["Encrypted"] for disk in node_config["BlockDeviceMappings"])
        assert node_config["IamInstanceProfile"]["Name"] in ("helix-head", "helix-worker")


def test_what_ray_fills_in_opens_nothing(config: Document):
    """Ray's defaults start the dashboard on every address; ours replace them and do not add to them."""
    filled = prepare_config(copy_of(config))
    commands = "\n".join(filled["head_start_ray_commands"] + filled["worker_start_ray_commands"])
    assert "0.0.0.0" not in commands and "--dashboard-host=127.0.0.1" in commands
    assert filled["head_setup_commands"] == config["setup_commands"] + config["head_setup_commands"]
    assert filled["worker_setup_commands"] == config["setup_commands"] + config["worker_setup_commands"]
    assert filled["file_mounts"] == {}


def test_one_region_is_meant_everywhere(config: Document):
    region = config["provider"]["region"]
    assert f"AWS_DEFAULT_REGION={region}\n" in config["setup_commands"][0]
    assert yaml.safe_load((CLUSTER / "prices.yaml").read_text())["region"] == region


# The commands, run

TOKEN = "0123456789abcdef-not-a-secret"
PASSWORD = "[mlflow]\nmlflow_tracking_username = sweeper\nmlflow_tracking_password = not-a-secret-either\n"


@pytest.fixture
def machine(tmp_path: Path, s3_address: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home, an /opt as the image has it, a Systems Manager that holds the secrets, and stand-ins for ray and sudo."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL_S3"])
    ssm = boto3.client("ssm", region_name="us-east-1")
    for name, value in {"/helix/ray-auth-token": TOKEN, "/helix/mlflow-credentials": PASSWORD}.items():
        ssm.put_parameter(Name=name, Value=value, Type="SecureString", Overwrite=True)
    (tmp_path / "opt/ray/bin").mkdir(parents=True)
    (tmp_path / "opt/helix/cluster").mkdir(parents=True)
    shutil.copy(CLUSTER / "fetch_secret.py", tmp_path / "opt/helix/cluster")
    (tmp_path / "opt/ray/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "home").mkdir()
    (tmp_path / "bin").mkdir()
    for name in ("ray", "sudo"):
        script = f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/calls\nenv >{tmp_path}/{name}.env\n'
        (tmp_path / "bin" / name).write_text(script)
    for path in (*(tmp_path / "bin").iterdir(), tmp_path / "opt/ray/bin/python"):
        path.chmod(0o755)
    return tmp_path


def run(machine: Path, commands: list[str]) -> list[str]:
    """Each command in a shell of its own, as Ray runs them over SSH; returns the calls of ray and sudo."""
    environment = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
    environment.pop("AWS_DEFAULT_REGION", None)
    environment |= {
        "HOME": str(machine / "home"),
        "PATH": f"{machine}/bin:/usr/bin:/bin",
        "NO_PROXY": "127.0.0.1",
        "RAY_HEAD_IP": "10.0.0.5",
    }
    for command in commands:
        wrapped = f"true && source ~/.bashrc; ({command.replace('/opt/', f'{machine}/opt/')})"
        done = subprocess.run(["bash", "-c", wrapped], env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (command, done.stderr)
        assert TOKEN not in done.stdout + done.stderr and "not-a-secret" not in done.stdout + done.stderr
    return (machine / "calls").read_text().splitlines()


def environment_of(machine: Path, name: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in (machine / f"{name}.env").read_text().splitlines() if "=" in line)


def test_the_commands_start_a_head_that_has_the_token_and_the_settings(config: Document, machine: Path):
    names = ("setup_commands", "head_setup_commands", "head_start_ray_commands")
    calls = run(machine, [command for name in names for command in config[name]])
    assert calls[0] == "ray stop"
    assert calls[1].startswith("ray start --head --port=6379 --autoscaling-config=")
    token = machine / "home/.ray/auth_token"
    assert token.read_text() == TOKEN and stat.S_IMODE(token.stat().st_mode) == 0o600
    credentials = machine / "home/.mlflow/credentials"
    assert credentials.read_text() == PASSWORD.strip() and stat.S_IMODE(credentials.stat().st_mode) == 0o600
    seen = environment_of(machine, "ray")
    assert seen["RAY_AUTH_MODE"] == "token" and seen["HELIX_STORAGE"].startswith("s3://")
    assert seen["HELIX_CACHE"].startswith("/mnt/helix/") and seen["MLFLOW_TRACKING_URI"].startswith("http")
    assert TOKEN not in json.dumps(seen) and TOKEN not in "\n".join(calls)


def test_the_commands_start_a_worker_with_the_token_the_disk_and_the_daemon(config: Document, machine: Path):
    names = ("setup_commands", "worker_setup_commands", "worker_start_ray_commands")
    calls = run(machine, [command for name in names for command in config[name]])
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    assert calls == [
        f"sudo {machine}/opt/helix/cluster/local_nvme.sh /mnt/helix {user}",
        "sudo systemctl enable --now helix-notice",
        "ray stop",
        "ray start --address=10.0.0.5:6379",
    ]
    assert environment_of(machine, "ray")["RAY_AUTH_MODE"] == "token"
    assert (machine / "home/.ray/auth_token").read_text() == TOKEN
    assert not (machine / "home/.mlflow").exists(), "a worker has no business with MLflow"


def test_without_the_token_a_node_does_not_start(config: Document, machine: Path):
    boto3.client("ssm", region_name="us-east-1").delete_parameter(Name="/helix/ray-auth-token")
    with pytest.raises(AssertionError, match="assert 1 == 0"):
        run(machine, config["setup_commands"])
    assert not (machine / "home/.ray/auth_token").exists()


# The disk


@pytest.mark.parametrize("disks", [0, 1, 2])
def test_the_disks_of_a_machine_become_one_folder_once(disks: int, tmp_path: Path):
    devices, commands, mounted = tmp_path / "by-id", tmp_path / "bin", tmp_path / "mounted"
    devices.mkdir()
    commands.mkdir()
    for number in range(disks):
        (tmp_path / f"disk{number}").touch()
        for suffix in ("", "_1"):  # two names of the same disk
            name = f"nvme-Amazon_EC2_NVMe_Instance_Storage_AWS{number}{suffix}"
            (devices / name).symlink_to(tmp_path / f"disk{number}")
    (tmp_path / "root-volume").touch()
    (devices / "nvme-Amazon_Elastic_Block_Store_vol0").symlink_to(tmp_path / "root-volume")
    for name in ("mkfs.ext4", "mdadm", "mount", "chown"):
        (commands / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/calls\n')
    (commands / "mount").write_text((commands / "mount").read_text() + f"touch {mounted}\n")
    (commands / "mountpoint").write_text(f"#!/bin/sh\n[ -e {mounted} ]\n")
    for path in commands.iterdir():
        path.chmod(0o755)
    command = [CLUSTER / "local_nvme.sh", tmp_path / "cache", "somebody"]
    for _ in range(2):
        subprocess.run(command, env={"PATH": f"{commands}:/usr/bin:/bin", "DEVICES": str(devices)}, check=True)
    calls = (tmp_path / "calls").read_text()
    assert (tmp_path / "cache").is_dir()
    assert "root-volume" not in calls
    assert calls.count("mkfs.ext4") == calls.count("mount -o") == (1 if disks else 0)
    assert calls.count("mdadm --create") == (1 if disks > 1 else 0)
    assert f"chown somebody {tmp_path}/cache" in calls
