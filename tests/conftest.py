"""Settings that hold for every test: offline, one thread, shapes in the geometry's signatures executed."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

from jaxtyping import install_import_hook

install_import_hook("conceptx.geometry", "beartype.beartype")

import torch  # noqa: E402

torch.set_num_threads(1)
