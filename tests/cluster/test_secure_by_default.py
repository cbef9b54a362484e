"""No file that is shipped opens a door without a lock, and none holds a secret: every one of them is read for it."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.cluster.validators import CLUSTER, ROOT

#: What reaches a machine or a person who sets one up.
SHIPPED = sorted(
    path
    for path in CLUSTER.rglob("*")
    if path.is_file() and "__pycache__" not in path.parts and "secrets" not in path.parts
)

#: What a secret looks like: AWS's key ids and keys, private keys, tokens of services, a value given to a secret's name.
SECRETS = {
    "AWS key id": r"\b(AKIA|ASIA)[A-Z0-9]{16}\b",
    "AWS secret key": r"(?i)aws_secret_access_key\s*[=:]\s*[\"']?[A-Za-z0-9/+]{40}",
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "token of a service": r"\b(gh[pousr]_[A-Za-z0-9]{36}|hf_[A-Za-z0-9]{30,}|xox[bap]-[A-Za-z0-9-]{10,}|npg_\w{10,})",
    "password in an address": r"://[^/\s:@]+:[^/\s@$<]+@",
    "value of a secret's name": (
        r"(?i)\b[\w-]*(password|passwd|secret|auth_token|api_key)[\w-]*[\"']?\s*[=:]\s*[\"']?"
        r"(?![$<{\[(]|/|\./|valueFrom|secretName|\s|[\"']|not-a-|\w*(file|path)\b)[A-Za-z0-9+=!@#%^*.-]{6,}"
    ),
}

#: Lines that look like secrets and name one only, each with its reason.
INNOCENT = (
    r"secretKeyRef|secretName|POSTGRES_PASSWORD_FILE",  # where Kubernetes and compose find it
    r"--from-file=|--name /helix/|ssm/",  # a command that makes one
)


def secret_problems(text: str) -> list[str]:
    return [
        f"{kind}: line {number}"
        for number, line in enumerate(text.splitlines(), start=1)
        for kind, pattern in SECRETS.items()
        if re.search(pattern, line) and not any(re.search(innocent, line) for innocent in INNOCENT)
    ]


def door_problems(text: str) -> list[str]:
    """Servers that a file starts: each is bound to loopback or asks for a token or a password."""
    problems = []
    commands = re.sub(r"(\\\n|\n(?=\s+--))\s*", " ", text)  # a command that goes on in the next line
    for line in commands.splitlines():
        code = line.partition(" #")[0] if not line.lstrip().startswith("#") else ""
        if re.search(r"\bray start\b", code):
            if not re.search(r"RAY_AUTH_MODE[=:]\s*token", text):
                problems.append(f"Ray without a token: {code.strip()[:80]}")
            if "--head" in code and "--dashboard-host=127.0.0.1" not in code:
                problems.append(f"a dashboard that is not on loopback: {code.strip()[:80]}")
        if re.search(r"\bmlflow (server|ui)\b", code) and "--app-name basic-auth" not in code:
            problems.append(f"MLflow without sign-in: {code.strip()[:80]}")
        if re.search(r"\bredis-server\b", code) and "requirepass" not in code:
            problems.append(f"redis without a password: {code.strip()[:80]}")
        if re.search(r"(?<![\d.])0\.0\.0\.0|\[::\]", code):
            token = "dashboard-host" in code and re.search(r"authOptions: *\{ *mode: token *\}", text)  # of KubeRay
            if not token and "--app-name basic-auth" not in code:
                problems.append(f"open to every address: {code.strip()[:80]}")
        if re.search(r"auth[-_]?mode.*(disabled|none)|AUTH_METHOD.*trust|--auth(-host)?=trust|protected-mode no", code):
            problems.append(f"sign-in turned off: {code.strip()[:80]}")
        if re.search(r"type: (LoadBalancer|NodePort)|hostNetwork: true|hostPort:|enableIngress: true", code):
            problems.append(f"reachable from outside the cluster: {code.strip()[:80]}")
    if re.search(r"^kind: RayCluster", text, re.MULTILINE) and not re.search(
        r"authOptions: *\{ *mode: token *\}", text
    ):
        problems.append("a RayCluster without a token")
    if re.search(r"RAY_AUTH_MODE[=:]\s*(?!token|\")\S", text):
        problems.append("RAY_AUTH_MODE is not token")
    if re.search(r"ray job submit", text) and "RAY_AUTH_MODE" not in text:
        problems.append("a job without a token")
    return problems


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SHIPPED, ids=relative)
def test_a_file_of_the_cluster_opens_no_door_without_a_lock(path: Path):
    if path.suffix != ".md":  # what a README tells about Ray's and MLflow's defaults is no command
        assert door_problems(path.read_text()) == []


def test_every_file_is_read_and_the_doors_are_among_them():
    text = "".join(path.read_text() for path in SHIPPED)
    assert len(SHIPPED) >= 20
    for door in ("ray start --head", "mlflow server", "redis-server", "kind: RayCluster", "ray job submit"):
        assert door in text


def tracked() -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_of_the_repository_holds_a_secret():
    found = {}
    for path in tracked():
        if path.parts[len(ROOT.parts)] == "tests" or path.suffix == ".png":
            continue  # tests hold passwords of tests; keys that could open anything are looked for below
        try:
            problems = secret_problems(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        if path.suffix == ".py":  # names of variables and of arguments look like values; keys do not
            problems = [problem for problem in problems if not problem.startswith("value of")]
        if problems:
            found[relative(path)] = problems
    assert found == {}


def test_no_test_holds_a_key_that_opens_anything():
    found = {}
    for path in tracked():
        if path.suffix == ".py" and path != Path(__file__).resolve():
            for kind in ("AWS key id", "private key", "token of a service"):
                if re.search(SECRETS[kind], path.read_text()):
                    found[relative(path)] = kind
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [
        "aws_access_key_id: AKIA" + "IOSFODNN7EXAMPLE",
        "AWS_SECRET_ACCESS_KEY=" + "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        "-----BEGIN RSA PRIVATE KEY-----",
        "token: ghp_" + "a" * 36,
        "MLFLOW_TRACKING_URI=http://admin:hunter22@mlflow:5000",
        "postgresql+psycopg2://mlflow:hunter22@postgres/mlflow",
        "POSTGRES_PASSWORD: hunter22",
        "redis_password = hunter22",
        '  - { name: RAY_AUTH_TOKEN, value: "x" }\n    RAY_AUTH_TOKEN: 0123456789abcdef',
        "admin_password = password1234",
    ],
)
def test_a_planted_secret_is_found(line: str):
    assert secret_problems(f"first: line\n{line}\n")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("aws.yaml", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"),
        ("aws.yaml", "--dashboard-host=127.0.0.1", ""),
        ("aws.yaml", "RAY_AUTH_MODE=token", ""),
        ("aws.yaml", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled"),
        ("kuberay/raycluster.yaml", "authOptions: { mode: token }", "authOptions: { mode: disabled }"),
        ("kuberay/raycluster.yaml", "  authOptions: { mode: token }\n", ""),
        ("kuberay/raycluster.yaml", "serviceType: ClusterIP", "serviceType: ClusterIP\n    enableIngress: true"),
        ("kuberay/base.yaml", "type: ClusterIP", "type: LoadBalancer"),
        ("kuberay/base.yaml", "requirepass %s", ""),
        ("mlflow/serve.sh", "--app-name basic-auth", ""),
        ("mlflow/kubernetes.yaml", "type: ClusterIP", "type: NodePort"),
        ("mlflow/compose.yaml", "${HELIX_MLFLOW_BIND:-127.0.0.1}", "0.0.0.0"),
        ("mlflow/compose.yaml", "--auth-host=scram-sha-256", "--auth-host=trust"),
        ("helix-schedule.service", "RAY_AUTH_MODE=token", ""),
    ],
)
def test_a_door_that_is_opened_is_found(name: str, old: str, new: str):
    text = (CLUSTER / name).read_text()
    assert old in text and door_problems(text.replace(old, new))


def test_security_md_says_for_each_promise_which_test_holds_it():
    text = (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) >= 10
    for path, test in named:
        assert (ROOT / path).exists(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text(), test
