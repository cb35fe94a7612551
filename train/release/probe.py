"""Loads releases outside the repository and runs them as a user would.

Run as a script in a fresh, isolated process by proof.py; imports nothing of the repository.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.utils import HF_MODULES_CACHE


def _processor(release: str, trust: dict[str, bool]) -> Any:
    """Returns the release's processor; where torchvision is missing, without its part for videos, which needs it."""
    fields = json.loads((Path(release) / "processor_config.json").read_text(encoding="utf-8"))
    if transformers.utils.is_torchvision_available() or "video_processor" not in fields:
        return AutoProcessor.from_pretrained(release, **trust)
    kind = getattr(transformers, fields["processor_class"])
    names = [name for name in kind.get_attributes() if name != "video_processor"]
    kind = type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: names)})
    other = {name: value for name, value in fields.items() if name != "processor_class" and not isinstance(value, dict)}
    processor = kind(
        image_processor=AutoImageProcessor.from_pretrained(release),
        tokenizer=AutoTokenizer.from_pretrained(release),
        video_processor=None,
        **other,
    )
    processor.chat_template = (Path(release) / "chat_template.jinja").read_text(encoding="utf-8")
    return processor


def _inputs(processor: Any, messages: list[dict[str, Any]]) -> Any:
    """Returns what generate() takes."""
    if not hasattr(processor, "video_processor") and hasattr(processor, "video_token"):
        # apply_chat_template of some families looks at the part for videos
        text = processor.tokenizer.apply_chat_template(
            messages, chat_template=processor.chat_template, tokenize=False, add_generation_prompt=True
        )
        images = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        begin = processor.tokenizer.bos_token
        has_begin = begin is not None and text.startswith(begin)
        return processor(images=[images], text=[text], add_special_tokens=not has_begin, return_tensors="pt")
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def _ask(job: dict[str, Any], shared: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Returns what the release of a job makes of the conversation: ids, pixels, logits, new tokens."""
    trust = {} if job["plain"] else {"trust_remote_code": True}
    model = AutoModelForImageTextToText.from_pretrained(job["release"], **trust).eval()
    processor = _processor(job["release"], trust)
    code = Path(str(sys.modules[type(model).__module__].__file__)).resolve()
    home = Path(transformers.__file__).parent if job["plain"] else Path(HF_MODULES_CACHE)
    if not code.is_relative_to(home.resolve()):
        raise RuntimeError(f"the model's code is {code}, expected a file below {home}")
    with Image.open(job["image"]) as opened:
        image = opened.convert("RGB")
    messages = [
        {**message, "content": [{**part, "image": image} if part["type"] == "image" else part for part in content]}
        for message, content in ((message, message["content"]) for message in shared["messages"])
    ]
    inputs = _inputs(processor, messages)
    pixels = inputs["pixel_values"]
    inputs = inputs.to(model.dtype)
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=shared["last"]).logits
        answer = model.generate(**inputs, max_new_tokens=shared["new_tokens"], do_sample=False)
    return {
        "input_ids": inputs["input_ids"],
        "pixel_values": pixels.float(),
        "logits": logits.float(),
        "tokens": answer[:, inputs["input_ids"].shape[1] :],
    }


def main() -> None:
    """Writes what each release makes of the conversation."""
    shared = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(shared["threads"])
    if importlib.util.find_spec("models") is not None:
        raise RuntimeError("a package named models can be imported here: this proves nothing")
    for job in shared["jobs"]:
        found = _ask(job, shared)
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, job["found"])


if __name__ == "__main__":
    main()
