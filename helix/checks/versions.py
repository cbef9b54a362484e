"""Which versions are installed, and whether they are those that this source tree is tested with."""

import platform
import re
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from helix.doctor import Asked, Check
from helix.registry import CHECKS

#: The oldest Python that pyproject.toml admits.
OLDEST_PYTHON = (3, 11)

#: Distributions that every sweep imports.
NEEDED = ("torch", "numpy", "ray", "mlflow", "soundfile", "soxr", "boto3")

#: Distributions that make something faster, and what there is without them.
OPTIONAL = {
    "numba": "the CPU scan takes the reference, about ten times slower: pip install -c constraints.txt numba",
    "triton": "comes with torch for CUDA; not used on a CPU",
    "mamba-ssm": "the scan on CUDA is Triton's then; see the row `import mamba_ssm`; not used on a CPU",
    "causal-conv1d": "needed beside mamba-ssm on CUDA; not used on a CPU",
    "torchaudio": "not needed: helix computes mel spectrograms itself",
}


@CHECKS.register("versions")
def versions(_: Asked) -> Iterable[Check]:
    source = Path(__file__).resolve().parents[2] / "constraints.txt"
    pins = read_pins(source.read_text(encoding="utf-8")) if source.is_file() else None
    yield judge_python(sys.version_info[:2], platform.python_version())
    yield from judge({name: installed_version(name) for name in (*NEEDED, *OPTIONAL)}, pins)


def installed_version(distribution: str) -> str | None:
    """From the distribution's metadata: importing it could take seconds, or fail."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def read_pins(constraints: str) -> dict[str, str]:
    """name -> version of the lines `name==version`."""
    lines = (line.partition("#")[0].strip() for line in constraints.splitlines())
    return {_normal(name): version for name, pinned, version in (line.partition("==") for line in lines) if pinned}


def judge_python(version: tuple[int, int], shown: str) -> Check:
    if version >= OLDEST_PYTHON:
        return Check(name="python", status="ok", found=shown, needed=True)
    wanted = ".".join(map(str, OLDEST_PYTHON))
    advice = f"make a new environment with Python {wanted} or newer: make PYTHON=python{wanted} sweep"
    return Check(name="python", status="fail", found=shown, advice=advice, needed=True)


def judge(installed: Mapping[str, str | None], pins: Mapping[str, str] | None) -> Iterable[Check]:
    """Each distribution against its pin; without `pins` (no source checkout near) every version is accepted."""
    for name, version in installed.items():
        needed = name in NEEDED
        pin = (pins or {}).get(_normal(name))
        if version is None and needed:
            advice = f"pip install -c constraints.txt {name}"
            yield Check(name=name, status="fail", found="not installed", advice=advice, needed=True)
        elif version is None:
            yield Check(name=name, status="absent", found="not installed", advice=OPTIONAL[name])
        elif pin is None:
            yield Check(name=name, status="ok", found=version, needed=needed)
        elif version.partition("+")[0] == pin:
            yield Check(name=name, status="ok", found=f"{version}, as pinned", needed=needed)
        else:
            advice = f"install with the pins: pip install -c constraints.txt {name}=={pin}"
            if name == "torch":
                advice += (
                    "; pip chose another torch because something was installed without -c: extensions that were built "
                    "for the old one (mamba-ssm, causal-conv1d, torchaudio) stop working, and numbers may differ"
                )
            yield Check(name=name, status="warn", found=f"{version}, pinned is {pin}", advice=advice, needed=needed)


def _normal(name: str) -> str:
    """Distributions are the same whatever the case of their names and the separators in them."""
    return re.sub(r"[-_.]+", "-", name).lower()
