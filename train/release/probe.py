"""What a stranger does with a release: loads it where the repository is not, and asks it.

Run as a script in a fresh, isolated process by proof.py; imports nothing of the repository.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import HF_MODULES_CACHE


def main() -> None:
    """Writes what the release in a job makes of the job's conversation: ids, pixels, logits, new tokens."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    if importlib.util.find_spec("models") is not None:
        raise RuntimeError("a package named models can be imported here: this proves nothing")
    trust = {} if job["plain"] else {"trust_remote_code": True}
    model = AutoModelForImageTextToText.from_pretrained(job["release"], **trust).eval()
    processor = AutoProcessor.from_pretrained(job["release"], **trust)
    code = Path(str(sys.modules[type(model).__module__].__file__)).resolve()
    home = Path(transformers.__file__).parent if job["plain"] else Path(HF_MODULES_CACHE)
    if not code.is_relative_to(home.resolve()):
        raise RuntimeError(f"the model's code is {code}, expected a file below {home}")
    with Image.open(job["image"]) as image:
        for message in job["messages"]:
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = image.convert("RGB")
    inputs = processor.apply_chat_template(
        job["messages"], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    pixels = inputs["pixel_values"]
    inputs = inputs.to(model.dtype)
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=job["last"]).logits
        answer = model.generate(**inputs, max_new_tokens=job["new_tokens"], do_sample=False)
    found = {
        "input_ids": inputs["input_ids"],
        "pixel_values": pixels.float(),
        "logits": logits.float(),
        "tokens": answer[:, inputs["input_ids"].shape[1] :],
    }
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, job["found"])


if __name__ == "__main__":
    main()
