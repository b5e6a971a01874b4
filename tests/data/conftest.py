import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before `datasets` is imported: nothing here may wait for a network
sys.path.insert(0, str(Path(__file__).parent))  # for `data_helpers`


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path, monkeypatch):
    """What `datasets` converts goes to the test's own folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
