"""Whether results can be kept, and with `--ray` whether a local Ray starts."""

from collections.abc import Iterable
from pathlib import Path

from helix.doctor import Asked, Check
from helix.registry import CHECKS
from helix.storage import open_storage


@CHECKS.register("storage")
def storage(asked: Asked) -> Iterable[Check]:
    yield judge_storage(asked.storage)
    if asked.rehearse_ray is not None:
        try:
            yield Check(name="local Ray", status="ok", found=asked.rehearse_ray(), needed=True)
        except Exception as error:  # Ray raises whatever its parts do
            advice = "look into the newest folder under the temporary directory of Ray, logs/raylet.err"
            found = f"{type(error).__name__}: {error}"
            yield Check(name="local Ray", status="fail", found=found, advice=advice, needed=True)


def judge_storage(address: str) -> Check:
    """Write, read and delete a probe there; a folder that was made for it goes again."""
    folder = Path(address).expanduser()
    was_there = folder.exists()
    try:
        open_storage(address).check_writable()
    except (ValueError, OSError) as error:
        return Check(name="storage", status="fail", found=address, advice=str(error), needed=True)
    finally:
        if not was_there and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return Check(name="storage", status="ok", found=f"{address} can be written", needed=True)
