"""A function in a process of its own, and how much memory a process holds."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def in_own_process(function: Callable[..., Any], *arguments: Any, threads: int) -> Any:
    """What `function(*arguments)` returns in a fresh process with so many threads. Raises what it raises.

    The process imports what the function needs and nothing else, so that its memory is its own. RuntimeError where it
    was killed, which a machine with too little memory does.
    """
    asked, root = pickle.dumps((function, arguments, threads)), Path(__file__).resolve().parents[1]
    ended = subprocess.run(
        [sys.executable, "-c", "from helix.process import answer; answer()"],
        input=asked,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))},
        check=False,
    )
    if ended.returncode:
        raise RuntimeError("its process was killed: probably there is not enough memory")
    result, error = pickle.loads(ended.stdout)
    if error is not None:
        raise error
    return result


def answer() -> None:
    """The other side of `in_own_process`: from standard input the function, to standard output what it returns."""
    function, arguments, threads = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    out, sys.stdout = sys.stdout, sys.stderr
    try:
        found = function(*arguments), None
    except Exception as error:  # whatever it is, the one who asked is to have it
        found = None, error
    out.buffer.write(pickle.dumps(found))
    out.flush()
    os._exit(0)  # threads of libraries that are still at work may abort a process that ends in good order


def held_bytes() -> int:
    """The memory that this process holds now. Raises OSError where the system (any but Linux) does not say."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most memory that this process has held since `forget_peak`. Raises OSError as `held_bytes` does."""
    return _status("VmHWM")


def forget_peak() -> None:
    """From here on `peak_bytes` counts anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(what: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{what}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {what}")
