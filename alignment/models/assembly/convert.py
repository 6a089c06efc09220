"""Converts a GGUF file into a transformers folder with safetensors: ``convert FILE.gguf FOLDER``. It runs once, when
the bundled model is first needed. transformers dequantises; the result is a plain bfloat16 model."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from alignment.core.child_processes import end_process


def convert(gguf: Path, folder: Path) -> None:
    """Writes model and tokenizer into ``folder``."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # The weights are plain numbers now; the quantiser's configuration would be saved and mislead a reader.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.config._name_or_path = ""
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
    end_process(0)
