"""Without a GPU, Triton's interpreter runs the kernels for one; it must be chosen before torch imports Triton."""

import os
import shutil

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
