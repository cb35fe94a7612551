"""The checkpoint that a run starts from, built from tiny parts on the disk."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from models import FusedLlavaForConditionalGeneration
from recipes.schema import Recipe, RecipeError
from train.checks import check_run
from train.weights import build_initial, load_checkpoint, read_processor

QUICKSTART = Path(__file__).resolve().parents[1] / "recipes/configs/quickstart"
WORDS = 382  # the tokenizer below without <image> and <pad>
NARROW = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


@pytest.fixture
def parts(tmp_path):
    """A pretrained decoder with a tokenizer that knows no image, a pretrained tower, and a config for both."""
    torch.manual_seed(1)
    text = LlamaConfig(**NARROW, num_hidden_layers=2, vocab_size=WORDS)
    LlamaForCausalLM(text).save_pretrained(tmp_path / "decoder")
    vision = CLIPVisionConfig(**NARROW, num_hidden_layers=2, image_size=64, patch_size=16, hidden_act="gelu")
    CLIPVisionModel(vision).save_pretrained(tmp_path / "tower")
    folder = tmp_path / "config"
    shutil.copytree(QUICKSTART, folder)
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART)
    tokens = json.loads(tokenizer.backend_tokenizer.to_str())
    names = [word for word in tokens["model"]["vocab"] if word not in ("<image>", "<pad>")]
    tokens["model"]["vocab"] = {word: number for number, word in enumerate(names)}
    tokens["added_tokens"] = []
    (tmp_path / "decoder/tokenizer.json").write_text(json.dumps(tokens))
    (tmp_path / "decoder/tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"image_token_index": len(names), "pad_token_id": len(names) + 1, "image_seq_length": 16}
    config["text_config"] |= {**NARROW, "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 390}
    config["vision_config"] |= {**NARROW, "num_hidden_layers": 2, "patch_size": 16}
    (folder / "config.json").write_text(json.dumps(config))
    change_json(folder / "processor_config.json", {"patch_size": 16})
    return tmp_path


@pytest.fixture
def make_recipe(parts):
    def make(**model):
        raw = yaml.safe_load((QUICKSTART.parents[1] / "quickstart.yaml").read_text())
        raw["model"] = {"config": str(parts / "config"), "stages": {"enter": 0, "exit": 1}} | model
        raw["train"]["precision"], raw["align"] = "fp32", None  # the first phase decides the type of the weights
        raw["output"] = str(parts / "run")  # whatever this checkout has trained
        return Recipe.model_validate(raw)

    return make


def test_a_llava_is_assembled_from_pretrained_parts_and_its_vocabulary_extended(parts, make_recipe):
    recipe = make_recipe(language_model=str(parts / "decoder"), vision_tower=str(parts / "tower"))
    build_initial(recipe, parts / "init")
    model = load_checkpoint(parts / "init", dtype=torch.float32)
    decoder = LlamaForCausalLM.from_pretrained(parts / "decoder")
    tower = CLIPVisionModel.from_pretrained(parts / "tower")
    assert model.config.stages["exit"] == 1
    assert model.lm_head.weight.shape == (390, 16)
    torch.testing.assert_close(model.lm_head.weight[:WORDS], decoder.lm_head.weight[:WORDS])
    assert bool(torch.isfinite(model.get_input_embeddings().weight).all())
    for name, weight in tower.state_dict().items():
        torch.testing.assert_close(model.model.vision_tower.state_dict()[name], weight)
    query = "layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(model.model.language_model.get_parameter(query), decoder.model.get_parameter(query))
    processor = read_processor(recipe.model)
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id
    assert processor.tokenizer.pad_token == "<pad>"


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("top", [True, False])
@pytest.mark.parametrize("text", [True, False])
def test_tied_embeddings_are_those_of_the_decoder_whatever_the_configs_flags_say(
    parts, make_recipe, is_tied, top, text
):
    torch.manual_seed(1)
    shape = LlamaConfig(**NARROW, num_hidden_layers=2, vocab_size=WORDS, tie_word_embeddings=is_tied)
    LlamaForCausalLM(shape).save_pretrained(parts / "decoder")
    change_json(parts / "config/config.json", {"tie_word_embeddings": top})
    change_json(parts / "config/config.json", {"tie_word_embeddings": text}, "text_config")
    recipe = make_recipe(language_model=str(parts / "decoder"), stages=None)
    decoder = LlamaForCausalLM.from_pretrained(parts / "decoder").eval()
    build_initial(recipe, parts / "init")
    model = load_checkpoint(parts / "init", dtype=torch.float32).eval()
    ids = torch.tensor([[3, 5, 7]])
    assert model.config.text_config.tie_word_embeddings is is_tied
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits[..., :WORDS], decoder(input_ids=ids).logits)


def test_the_seed_decides_the_random_weights(parts, make_recipe):
    recipe = make_recipe(language_model=str(parts / "decoder"))
    for name in ("a", "b"):
        build_initial(recipe, parts / name)
    build_initial(recipe.model_copy(update={"seed": 7}), parts / "c")
    heads = [load_checkpoint(parts / name, dtype=torch.float32).model for name in "abc"]
    weights = [model.multi_modal_projector.linear_1.weight for model in heads]
    towers = [next(model.vision_tower.parameters()) for model in heads]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(towers[0], towers[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_checkpoint_is_taken_over_under_the_recipe_s_plan(parts, make_recipe):
    build_initial(make_recipe(language_model=str(parts / "decoder")), parts / "first")
    recipe = make_recipe(config=None, checkpoint=str(parts / "first"), stages=None)
    build_initial(recipe, parts / "second")
    first, second = (load_checkpoint(parts / name, dtype=torch.float32) for name in ("first", "second"))
    assert second.config.stages is None
    for name, weight in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], weight)


def test_a_part_whose_weights_are_not_those_of_its_config_is_refused(parts, make_recipe):
    for file, section in (("config/config.json", "text_config"), ("decoder/config.json", None)):
        change_json(parts / file, {"intermediate_size": 32}, section)
    with pytest.raises(RecipeError, match=r"model.language_model: '.*decoder' cannot be read") as caught:
        build_initial(make_recipe(language_model=str(parts / "decoder")), parts / "init")
    assert "\n" not in str(caught.value)
    assert not (parts / "init").exists()


@pytest.mark.parametrize(
    ("key", "part", "name"),
    [
        ("language_model", "decoder", "layers.1.mlp.up_proj.weight"),
        ("vision_tower", "tower", "layers.0.mlp.fc1.bias"),
    ],
)
def test_a_part_without_one_of_its_weights_is_refused(parts, make_recipe, key, part, name):
    file = parts / part / "model.safetensors"
    weights = {full: weight for full, weight in load_file(file).items() if not full.endswith(name)}
    save_file(weights, file, {"format": "pt"})
    recipe = make_recipe(**{"language_model": str(parts / "decoder"), key: str(parts / part)})
    with pytest.raises(RecipeError, match=f"'{parts / part}': missing keys: .*{name}"):
        build_initial(recipe, parts / "init")
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(RecipeError, match=f"model.{key}: '{parts / part}' cannot be read"):
        build_initial(recipe, parts / "init")


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("decoder", {"intermediate_size": 32}),
        ("decoder", {"rms_norm_eps": 1e-3}),
        ("decoder", {"hidden_act": "gelu"}),
        ("decoder", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
        ("decoder", {"model_type": "mistral"}),
        ("tower", {"hidden_act": "quick_gelu"}),
        ("tower", {"layer_norm_eps": 1e-3}),
    ],
)
def test_a_part_that_computes_otherwise_than_the_config_says_is_refused(parts, make_recipe, part, changes):
    change_json(parts / part / "config.json", changes)
    key = "language_model" if part == "decoder" else "vision_tower"
    recipe = make_recipe(**{"language_model": str(parts / "decoder"), key: str(parts / part)})
    for refuse in (lambda: check_run(recipe, 1), lambda: build_initial(recipe, parts / "init")):
        with pytest.raises(RecipeError) as caught:
            refuse()
        assert str(caught.value).startswith(f"model.{key}: '{parts / part}': config.json: {next(iter(changes))}: got ")
    assert not (parts / "init").exists()


def test_what_no_output_depends_on_may_differ(parts, make_recipe):
    change_json(parts / "decoder/config.json", {"max_position_embeddings": 99, "use_cache": False, "bos_token_id": 7})
    check_run(make_recipe(language_model=str(parts / "decoder")), 1)


def test_parts_in_the_form_of_vicuna_and_clip_are_assembled(parts, make_recipe):
    vicuna, clip = save_as_vicuna(parts / "vicuna"), save_as_clip(parts / "clip")
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    change_json(parts / "config/config.json", {"image_token_index": 600, "pad_token_id": 601})
    change_json(parts / "config/config.json", {"vocab_size": 640, "pad_token_id": 601, **ids}, "text_config")
    recipe = make_recipe(language_model=str(parts / "vicuna"), vision_tower=str(parts / "clip"))
    check_run(recipe, 1)
    build_initial(recipe, parts / "init")
    model = load_checkpoint(parts / "init", dtype=torch.float32).eval()
    pieces = SentencePieceProcessor(str(parts / "vicuna/tokenizer.model"))
    text = "A chat between a curious user and an assistant. USER: two  spaces?\nASSISTANT: naïve"
    tokens = read_processor(recipe.model).tokenizer(text).input_ids
    assert tokens == [1, *pieces.encode(text)]
    with torch.no_grad():
        found = model(input_ids=torch.tensor([tokens])).logits[..., :600]
        torch.testing.assert_close(found, vicuna.eval()(input_ids=torch.tensor([tokens])).logits)
    for name, weight in clip.vision_model.state_dict().items():
        torch.testing.assert_close(model.model.vision_tower.state_dict()[name], weight)


def save_as_vicuna(folder):
    """Saves a decoder as lmsys/vicuna-7b-v1.5 is: pickled shards, sampling settings, a tokenizer of SentencePiece."""
    folder.mkdir()
    model = LlamaForCausalLM(LlamaConfig(**NARROW, num_hidden_layers=2, vocab_size=600))
    weights = list(model.state_dict().items())
    shards = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    index = {}
    for shard, part in zip(shards, (weights[:5], weights[5:]), strict=True):
        torch.save(dict(part), folder / shard)
        index |= {name: shard for name, _ in part}
    save_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": index})
    fields = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **NARROW, "num_hidden_layers": 2}
    more = {"vocab_size": 600, "pad_token_id": 0, "rope_scaling": None, "torch_dtype": "float32", "pretraining_tp": 1}
    save_json(folder / "config.json", {**fields, **more, "tie_word_embeddings": False, "use_cache": True})
    save_json(folder / "generation_config.json", {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2})
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    save_json(folder / "special_tokens_map.json", {**names, "pad_token": "<unk>"})
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "pad_token": None}
    save_json(folder / "tokenizer_config.json", {**names, **settings, "model_max_length": 4096})
    SentencePieceTrainer.train(
        sentence_iterator=iter((QUICKSTART.parents[2] / "README.md").read_text().splitlines()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model


def save_as_clip(folder):
    """Saves both towers, pickled, as openai/clip-vit-large-patch14-336 is, with the positions of old checkpoints."""
    vision = {**NARROW, "num_hidden_layers": 2, "image_size": 64, "patch_size": 16, "hidden_act": "gelu"}
    model = CLIPModel(CLIPConfig(text_config={**NARROW, "num_hidden_layers": 1}, vision_config=vision))
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors") | {
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
        "text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return model


def save_json(file, fields):
    file.write_text(json.dumps(fields), encoding="utf-8")


def change_json(file, changes, section=None):
    fields = json.loads(file.read_text(encoding="utf-8"))
    (fields if section is None else fields[section]).update(changes)
    save_json(file, fields)


def test_a_checkpoint_with_a_weight_too_few_or_too_many_is_refused_by_name(parts, make_recipe):
    build_initial(make_recipe(language_model=str(parts / "decoder")), parts / "init")
    model = FusedLlavaForConditionalGeneration.from_pretrained(parts / "init")
    weights = model.state_dict()
    name = "model.multi_modal_projector.linear_2.bias"
    model.save_pretrained(parts / "few", state_dict={k: v for k, v in weights.items() if k != name})
    with pytest.raises(RecipeError, match=r"missing keys.*linear_2.bias"):
        load_checkpoint(parts / "few", dtype=torch.float32)
    model.save_pretrained(parts / "shape", state_dict=weights | {name: torch.zeros(3)})
    with pytest.raises(RecipeError, match=r"mismatched keys.*linear_2.bias"):
        load_checkpoint(parts / "shape", dtype=torch.float32)
    model.save_pretrained(parts / "many", state_dict=weights | {"model.odd.weight": torch.zeros(3)})
    with pytest.raises(RecipeError, match=r"unexpected keys.*odd.weight"):
        load_checkpoint(parts / "many", dtype=torch.float32)


def test_an_image_token_of_another_number_is_refused(parts, make_recipe):
    change_json(parts / "config/config.json", {"image_token_index": 3})
    with pytest.raises(RecipeError, match=r"image_token_index: got 3, expected one of"):
        build_initial(make_recipe(language_model=str(parts / "decoder")), parts / "init")


def test_a_part_that_is_nowhere_is_named(parts, make_recipe):
    recipe = make_recipe(language_model=str(parts / "decoder"), vision_tower=str(parts / "nowhere"))
    with pytest.raises(RecipeError, match=r"model.vision_tower: '.*nowhere' cannot be read"):
        build_initial(recipe, parts / "init")
