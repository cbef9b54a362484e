"""Real recordings in every official layout give the same manifest in a folder and in a bucket, byte for byte."""

from pathlib import Path

import numpy as np
import pytest

from helix.data.shards import open_prepared, prepare, verify
from helix.storage import FolderStorage, open_storage

LAYOUTS = {
    "esc50": ("esc50", "ESC-50-master", {}),
    "speech_commands": ("speech_commands", "speech_commands_v0.02-mini", {}),
    "concat_speech_commands": ("speech_commands", "speech_commands_v0.02-mini", {"n": 2}),
    "librispeech": ("librispeech", "librispeech-mini", {}),
    "urbansound8k": ("urbansound8k", "urbansound8k-official-tiny", {}),
}


@pytest.mark.service
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_and_a_bucket_hold_equal_manifests(name, real_folder, s3_address, tmp_path, monkeypatch):
    pack, folder, options = LAYOUTS[name]
    source = real_folder(pack, folder)
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path / "cache"))
    storages = FolderStorage(tmp_path / "storage"), open_storage(s3_address)
    prepared = [
        prepare(name, options, source=source, storage=storage, allow_partial=True, shard_mib=8) for storage in storages
    ]
    assert prepared[0] == prepared[1]
    key = f"{prepared[0].prefix}/manifest.json"
    assert storages[0].get(key) == storages[1].get(key)
    assert [*storages[0].keys("data")] == [*storages[1].keys("data")]
    assert [verify(storage, prepared[0].prefix)[1] for storage in storages] == [[], []]
    here, there = (open_prepared(storage, prepared[0].prefix) for storage in storages)
    for row in np.linspace(0, len(here) - 1, 5).astype(int).tolist():
        assert np.array_equal(here.wave(row), there.wave(row))
    assert list(Path(tmp_path / "cache").glob("*.bin")), "what was read from the bucket is in the cache"
