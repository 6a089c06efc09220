"""Files of weights as safetensors writes them, without torch, for plans that read no more than their size."""

from __future__ import annotations

import json


def weights_file(content: bytes = b"weights") -> bytes:
    """A file with one tensor, whose bytes are ``content``."""
    tensor = {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}
    header = json.dumps({"weight": tensor}).encode()
    return len(header).to_bytes(8, "little") + header + content
