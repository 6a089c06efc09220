"""A policy from PPO loads in a script of transformers and PEFT alone and gives the answers that the report shows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.e2e.conftest import Align, environment
from tests.proofs.common import Claim
from tests.tiny import save_tiny_model

TOKENS = 12
SCRIPT = f"""
import json, sys
from pathlib import Path
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, artifact, samples = map(Path, sys.argv[1:])
tokenizer = AutoTokenizer.from_pretrained(str(base))
model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
for adapter in sorted((artifact / "adapters").iterdir()):
    model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
model.eval()
for line in samples.read_text().splitlines():
    messages = json.loads(line)["messages"]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    told = model.generate(**asked, do_sample=False, max_new_tokens={TOKENS})
    answer = tokenizer.decode(told[0, asked["input_ids"].shape[1]:], skip_special_tokens=True).strip()
    print(json.dumps(answer))
assert not [name for name in sys.modules if name.partition(".")[0] == "alignment"]
"""


def run(folder: Path) -> list[Claim]:
    """The answers to all held-out prompts of a run on a tiny model."""
    align = Align(output=folder / "output", model=save_tiny_model(folder / "tiny"))
    align(
        "run",
        "~stages.dpo",
        "stages.evaluate.arms=[base,stage:sft,stage:ppo]",
        f"stages.evaluate.max_new_tokens={TOKENS}",
    )
    samples = align.artifact("evaluate") / "samples.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(align.model), str(align.artifact("ppo")), str(samples)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    plain = [json.loads(line) for line in done.stdout.splitlines()]
    shown = [json.loads(line)["answers"] for line in samples.read_text(encoding="utf-8").splitlines()]
    return [
        Claim(figure="answers", values=(float(len(plain)),), at_least=len(shown)),
        Claim(
            figure="answers that differ",
            values=(_differing(plain, [a["stage:ppo"]["text"] for a in shown]),),
            at_most=0,
        ),
        Claim(
            figure="answers that PPO changed",
            values=(_differing(plain, [a["stage:sft"]["text"] for a in shown]),),
            at_least=1,
        ),
    ]


def _differing(some: list[str], others: list[str]) -> float:
    return float(sum(text != other_text for text, other_text in zip(some, others, strict=True)))
