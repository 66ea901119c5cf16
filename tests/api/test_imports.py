from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
import disagg.api.app, disagg.api.http.server
from disagg.api.text.tokenizer import ModelTokenizer
from disagg.config.demo import demo_model_folder
ModelTokenizer.load(demo_model_folder())
print(*sorted({'torch', 'transformers', 'numpy'} & sys.modules.keys()))
"""


def test_the_http_layer_loads_neither_torch_nor_transformers() -> None:
    """The router's process must start in a second and fit beside workers."""
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
