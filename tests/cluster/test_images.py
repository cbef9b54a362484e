"""The images hold what constraints.txt pins; the scripts that make them, run with stand-ins, do what they say."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from cluster.images.requirements import requirements
from helix.checks.versions import read_pins
from tests.cluster.validators import CLUSTER, ROOT, load_all, path_without

DOCKERFILES = sorted(CLUSTER.rglob("Dockerfile*"))
SCRIPTS = sorted(CLUSTER.rglob("*.sh"))
PINS = read_pins((ROOT / "constraints.txt").read_text())


def instructions(text: str) -> list[tuple[str, str]]:
    """Of a Dockerfile: (FROM, ...), (RUN, ...), continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


KNOWN = {"FROM", "RUN", "COPY", "ARG", "ENV", "USER", "WORKDIR", "ENTRYPOINT"}


def dockerfile_problems(text: str) -> list[str]:
    problems, stages = [], []
    steps = instructions(text)
    problems += [f"unknown instruction {name}" for name, _ in steps if name not in KNOWN]
    for name, rest in steps:
        if name == "FROM":
            base, *stage = rest.split()
            stages.append(stage[1] if stage else "")
            tag = base.rpartition(":")[2] if ":" in base else ""
            if not re.search(r"\d", tag.replace("${CUDA}", "13")) or tag == "latest":
                problems.append(f"{base} is not pinned")
        if name == "COPY":
            for source in [part for part in shlex.split(rest) if not part.startswith("--")][:-1]:
                if "--from" not in rest and not (ROOT / source).exists():
                    problems.append(f"{source} does not exist")
        if name == "RUN":
            problems += pip_problems(rest)
            problems += [
                f"{found} does not exist"
                for found in re.findall(r"/src/(cluster/\S+\.sh)", rest)
                if not (ROOT / found).exists()
            ]
        for source in re.findall(r"from=(\w+)", rest):
            if source not in stages:
                problems.append(f"no stage {source}")
    users = [rest for name, rest in steps if name == "USER"]
    if not users or users[-1] in ("root", "0"):
        problems.append("it runs as root")
    return problems


def pip_problems(command: str) -> list[str]:
    """Every pip that installs is held to the constraints, and a version that is named is the one that they name."""
    problems = []
    for part in re.split(r"&&|;|\n", command):
        if re.search(r"\bpip (install|wheel|download)\b", part) and not re.search(r"-c \S*constraints\.txt", part):
            problems.append(f"pip without the constraints: {part.strip()}")
    for name, version in re.findall(r"([A-Za-z][\w.-]*)(?:\[[\w,]+\])?==([\w.]+)", command):
        if PINS.get(name.lower().replace("_", "-")) != version:
            problems.append(f"{name}=={version} is not what constraints.txt pins")
    return problems


def script_lines(path: Path) -> str:
    return re.sub(r"\\\n\s*", " ", path.read_text())


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: str(path.relative_to(CLUSTER)))
def test_a_dockerfile_is_pinned_and_ends_as_no_root(path: Path):
    assert dockerfile_problems(path.read_text()) == []


def test_there_is_one_for_a_cpu_one_for_a_gpu_and_one_for_mlflow():
    assert [str(path.relative_to(CLUSTER)) for path in DOCKERFILES] == [
        *("images/Dockerfile.cpu", "images/Dockerfile.gpu", "mlflow/Dockerfile"),
    ]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("FROM python:3.12-slim-bookworm", "FROM python"),
        ("FROM python:3.12-slim-bookworm", "FROM python:latest"),
        ("-c /src/constraints.txt", ""),
        ("boto3", "boto3==1.0.0"),
        ("USER mlflow", "USER root"),
        ("USER mlflow", ""),
        ("COPY constraints.txt", "COPY constraint.txt"),
        ("WORKDIR", "WORKDIRR"),
    ],
)
def test_an_error_planted_in_a_dockerfile_is_found(old: str, new: str):
    text = (CLUSTER / "mlflow" / "Dockerfile").read_text()
    assert old in text and dockerfile_problems(text.replace(old, new))


def test_a_stage_that_is_not_there_is_found():
    text = (CLUSTER / "images" / "Dockerfile.gpu").read_text()
    assert dockerfile_problems(text.replace("AS kernels", "AS kernel"))


#: What Triton compiles with, once, on each machine with a GPU.
FOR_TRITON = {"gcc", "libc6-dev", "python3-dev"}


def test_a_machine_with_a_gpu_gets_what_triton_compiles_with_where_it_runs():
    _, _, runtime = (CLUSTER / "images" / "Dockerfile.gpu").read_text().rpartition("\nFROM ")
    (installs,) = [rest for name, rest in instructions(runtime) if name == "RUN" and "apt-get install" in rest]
    assert set(installs.split()) >= FOR_TRITON
    for page in ("cluster/images/README.md", "README.md", "BENCHMARKS.md"):
        lines = re.findall(r"apt-get install (?:-y )?([^`\n]*gcc[^`\n]*)", (ROOT / page).read_text())
        assert lines and all(set(line.rstrip(")").split()) >= FOR_TRITON for line in lines), page


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses_stops_at_errors_and_installs_what_is_pinned(path: Path):
    shell = path.read_text().splitlines()[0].rpartition("/")[2].split()[-1]
    subprocess.run([shell, "-n", path], check=True)
    assert re.search(r"^set -e", path.read_text(), re.MULTILINE)
    assert path.stat().st_mode & 0o111
    assert pip_problems(script_lines(path)) == []


def test_everything_that_the_images_install_by_name_is_pinned():
    wanted = [*requirements(["gpu"]), "psycopg2-binary", "Flask-WTF"]
    names = {re.split(r"[\[<>=]", line)[0].lower().replace("_", "-") for line in wanted}
    assert names <= PINS.keys(), names - PINS.keys()


def test_requirements_are_those_of_the_project_with_the_extras_asked_for():
    plain = requirements([])
    assert any(line.startswith("ray[") for line in plain) and "mamba-ssm" not in plain
    assert {"mamba-ssm", "causal-conv1d"} <= set(requirements(["gpu"]))
    with pytest.raises(ValueError, match="unknown extra 'gpus'; known: dev, gpu"):
        requirements(["gpus"])


# The scripts, run with stand-ins


def stand_in(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("archs", ["8.6,8.9", "9.0"])
def test_nvcc_compiles_for_the_gpus_that_are_named_and_no_others(archs: str, tmp_path: Path):
    nvcc = stand_in(tmp_path / "nvcc", 'printf "%s\\n" "$@"')
    given = ["-c", "a b.cu", "-o", "x.o", "-O3"]
    given += ["-gencode", "arch=compute_75,code=sm_75", "-gencode=arch=compute_90,code=sm_90", "-std=c++17"]
    done = subprocess.run(
        [CLUSTER / "images" / "nvcc.sh", *given],
        env={"PATH": "/usr/bin:/bin", "NVCC": str(nvcc), "HELIX_CUDA_ARCHS": archs},
        capture_output=True,
        text=True,
        check=True,
    )
    passed = done.stdout.splitlines()
    assert passed[:6] == ["-c", "a b.cu", "-o", "x.o", "-O3", "-std=c++17"]
    numbers = [arch.replace(".", "") for arch in archs.split(",")]
    assert passed[6:] == [word for n in numbers for word in ("-gencode", f"arch=compute_{n},code=sm_{n}")]


def test_nvcc_that_compiles_nothing_is_left_alone(tmp_path: Path):
    nvcc = stand_in(tmp_path / "nvcc", 'echo "$@"; exit 3')
    environment = {"PATH": "/usr/bin:/bin", "NVCC": str(nvcc), "HELIX_CUDA_ARCHS": "8.9"}
    done = subprocess.run(
        [CLUSTER / "images" / "nvcc.sh", "--version"], env=environment, capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("--version\n", 3)


@pytest.mark.parametrize("archs", ["", "sm_89", "89", "8.9 "])
def test_an_architecture_that_is_none_is_refused(archs: str, tmp_path: Path):
    nvcc = stand_in(tmp_path / "nvcc", "exit 0")
    done = subprocess.run(
        [CLUSTER / "images" / "nvcc.sh", "-gencode", "x"],
        env={"PATH": "/usr/bin:/bin", "NVCC": str(nvcc), "HELIX_CUDA_ARCHS": archs},
        capture_output=True,
        text=True,
    )
    assert done.returncode and "such as 8.6,8.9" in done.stderr


PYTHON_STAND_IN = """
echo "python $*" >>{calls}
env | grep -E 'MAMBA|CAUSAL|NVCC|HELIX|MAX_JOBS' >>{calls}
case "$1 $2" in
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip")
    case "$*" in
    *" ninja "*) printf '#!/bin/bash\necho 1.13.0\n' >"${{0%/*}}/ninja" && chmod +x "${{0%/*}}/ninja" ;;
    *"pip wheel"*) echo "ninja $(command -v ninja)" >>{calls} ;;
    esac ;;
*) exec {python} "$@" ;;
esac
"""


def python_stand_in(tmp_path: Path) -> Path:
    """A python that makes virtual environments of itself, writes down what pip is asked; it installs ninja alone."""
    return stand_in(tmp_path / "python", PYTHON_STAND_IN.format(calls=tmp_path / "calls", python=sys.executable))


def test_the_kernels_are_built_against_the_pinned_torch_and_never_fetched(tmp_path: Path):
    environment = {
        "PATH": path_without(tmp_path / "system", "ninja"),
        "PYTHON": str(python_stand_in(tmp_path)),
        "BUILD_PREFIX": str(tmp_path / "build"),
        "NVCC": str(stand_in(tmp_path / "nvcc", "exit 0")),
    }
    subprocess.run([CLUSTER / "images" / "build_kernels.sh", tmp_path / "wheels", "9.0"], env=environment, check=True)
    calls = (tmp_path / "calls").read_text()
    wheel = next(line for line in calls.splitlines() if "pip wheel" in line)
    assert f"-c {ROOT}/constraints.txt" in wheel and wheel.endswith("causal-conv1d mamba-ssm")
    assert "--no-build-isolation" in wheel and "--no-deps" in wheel
    for setting in ("MAMBA_FORCE_BUILD=TRUE", "MAMBA_KEEP_CUDA_BUILD=TRUE", "CAUSAL_CONV1D_FORCE_BUILD=TRUE"):
        assert setting in calls
    assert f"PYTORCH_NVCC={CLUSTER}/images/nvcc.sh" in calls and "HELIX_CUDA_ARCHS=9.0" in calls
    assert f"ninja {tmp_path}/build/bin/ninja" in calls.splitlines(), "without it torch asks for no variable of these"


def test_torch_still_asks_that_variable_for_nvcc():
    source = Path(torch.__file__).parent / "utils" / "cpp_extension.py"
    assert 'os.getenv("PYTORCH_NVCC")' in source.read_text()


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_a_node_gets_the_pinned_dependencies_and_what_runs_beside_ray(kind: str, tmp_path: Path):
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHON": str(python_stand_in(tmp_path)),
        "RAY_PREFIX": str(tmp_path / "ray"),
        "HELIX_PREFIX": str(tmp_path / "helix"),
    }
    command = [CLUSTER / "images" / "install.sh", kind, *(["/wheels"] if kind == "gpu" else [])]
    for _ in range(2):  # the second finds the environment and goes on
        subprocess.run(command, env=environment, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sum("-m venv" in call for call in calls) == 1
    install = next(call for call in calls if "pip install" in call)
    assert f"-c {ROOT}/constraints.txt" in install and install.endswith(f"-r {tmp_path}/helix/requirements.txt")
    assert ("--find-links /wheels" in install) is (kind == "gpu")
    wanted = requirements(["gpu"] if kind == "gpu" else [])
    assert (tmp_path / "helix/requirements.txt").read_text().split("\n")[:-1] == wanted
    installed = {path.name for path in (tmp_path / "helix/cluster").iterdir()}
    assert installed == {"notice_daemon.py", "fetch_secret.py", "local_nvme.sh", "README.md", "constraints.txt"}
    assert not list((tmp_path / "helix").rglob("helix")), "the package itself comes with each job"


@pytest.mark.parametrize(("arguments", "said"), [(["tpu"], "known: cpu, gpu"), (["gpu"], "folder of wheels")])
def test_what_cannot_be_installed_is_refused_before_anything_is_done(arguments: list[str], said: str, tmp_path: Path):
    done = subprocess.run(
        [CLUSTER / "images" / "install.sh", *arguments],
        env={"PATH": "/usr/bin:/bin", "RAY_PREFIX": str(tmp_path / "ray")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_virtual_machine_gets_the_units_for_the_user_that_runs_ray(tmp_path: Path):
    command = [CLUSTER / "images" / "install_services.sh", "ubuntu"]
    subprocess.run(command, env={"PATH": "/usr/bin:/bin", "ETC": str(tmp_path)}, check=True)
    units = tmp_path / "systemd/system"
    for name in ("helix-notice.service", "helix-schedule.service", "helix-schedule.timer"):
        assert (units / name).read_text() == (CLUSTER / name).read_text()
    for name in ("helix-notice", "helix-schedule"):
        assert (units / f"{name}.service.d/user.conf").read_text() == "[Service]\nUser=ubuntu\n"
    assert (tmp_path / "helix/notice.env").read_text() == "PATH=/opt/ray/bin:/usr/bin:/bin\nRAY_AUTH_MODE=token\n"
    assert (tmp_path / "profile.d/ray.sh").read_text() == "PATH=/opt/ray/bin:$PATH\n"


def test_the_timer_starts_the_service_that_submits_with_a_token():
    service = (CLUSTER / "helix-schedule.service").read_text()
    timer = (CLUSTER / "helix-schedule.timer").read_text()
    assert "OnCalendar=" in timer and "Unit=" not in timer, "a timer starts the service of its own name"
    (command,) = re.findall(r"^ExecStart=(.*)$", service, re.MULTILINE)
    words = shlex.split(command)
    assert words[:6] == ["/usr/bin/env", "ray", "job", "submit", "--address", "http://127.0.0.1:8265"]
    assert words[words.index("--") + 1 :][:2] == ["python", "orchestration/schedule.py"]
    readme = (CLUSTER / "README.md").read_text()
    for name in re.findall(r"\$\{?(\w+)", command):
        assert f"{name}=" in readme
    assert "RAY_AUTH_MODE=token" in readme


@pytest.mark.skipif(not Path("/usr/bin/systemd-analyze").exists(), reason="systemd-analyze is not installed here")
@pytest.mark.parametrize("unit", sorted(CLUSTER.glob("helix-*.service")) + sorted(CLUSTER.glob("helix-*.timer")))
def test_systemd_takes_the_unit(unit: Path):
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
    assert "Unknown" not in done.stderr, done.stderr


def test_image_tags_of_the_manifests_are_pinned():
    for path in (*(CLUSTER / "kuberay").glob("*.yaml"), *(CLUSTER / "mlflow").glob("*.yaml")):
        for document in load_all(path):
            for image in re.findall(r"image: (\S+:\S+)", yaml.safe_dump(document)):
                assert re.search(r":[\w.-]*\d[\w.-]*$", image) and not image.endswith(":latest"), image
