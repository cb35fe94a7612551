"""Labels from one tokenisation: exactly the answers and their end marks, whatever people wrote."""

from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data.chat import IGNORE_INDEX, ChatFormat, TokenizerError, freeze_template, freeze_templates
from data.rows import RowError, Turn

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<pad>", "<image>", "<|im_start|>", "<|im_end|>"]
NASTY = [
    "yes",
    "",
    " ",
    "  two spaces ",
    "USER: who? ASSISTANT: me",
    "ASSISTANT:",
    "</s>",
    "</s></s>",
    "</</s>s>",
    "<s>a </s> b <image> c <pad>",
    "<ima<image>ge>",
    "<|im_end|>\n<|im_start|>user\nhello<|im_end|>",
    "\u4f60\u597d\uff0c\u4e16\u754c",
    "\u0645\u0631\u062d\u0628\u0627 \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "e\u0301 \u1100\u1161\u11a8 \u0000 \u2028",
    "line one\n\nline two\n",
    "\n leading",
    "\n\nyes",
    "\n\n\n",
    "user",
    "assistant",
]
FORMATS = ("vicuna_v1", "chat_template", "plain")
LEAD = {"vicuna_v1": " ", "chat_template": "", "plain": ""}
END = {"vicuna_v1": "</s>", "chat_template": "<|im_end|>", "plain": "\n"}


def byte_level(*more):
    """Returns a tokenizer like GPT-2's and Qwen's."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "A chat between a curious user and an assistant. USER: yes no question answer"
    core.train_from_iterator([text, *["\n\n\n\n"] * 9], trainer)  # newlines merge, as in Qwen's
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": [*SPECIAL[3:], *more]})
    fast.chat_template = CHATML
    return fast


def sentence_piece():
    """Returns a tokenizer like Llama's and Vicuna's: a space is written before the first word, bytes stand in."""
    letters = {chr(code) for code in range(33, 127)} | {"\u2581", "\u4f60", "\u597d"}
    table = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(letters)]
    merges = [("\u2581", "y"), ("\u2581y", "e"), ("\u2581ye", "s")]
    table += ["".join(pair) for pair in merges]
    core = Tokenizer(
        models.BPE({token: number for number, token in enumerate(table)}, merges, byte_fallback=True, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[3:]})
    fast.chat_template = CHATML
    return fast


@pytest.fixture(scope="module", params=[byte_level, sentence_piece])
def tokenizer(request):
    return request.param()


@pytest.fixture(params=FORMATS)
def chat(request, tokenizer):
    return ChatFormat(request.param, tokenizer)


def turns(*texts):
    return [Turn(("user", "assistant")[place % 2], text) for place, text in enumerate(texts)]


def text_of(tokenizer, ids):
    """Returns the exact text of ids; a decoder that trims the first space must not see it first."""
    anchor = tokenizer.convert_tokens_to_ids("<pad>")
    text = tokenizer.decode([anchor, *ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text.removeprefix("<pad>")


def runs(ids, labels):
    """Returns the runs of supervised ids."""
    found = [[]]
    for token, label in zip(ids, labels, strict=True):
        assert label in (IGNORE_INDEX, token)
        if label == token:
            found[-1].append(token)
        elif found[-1]:
            found.append([])
    return [run for run in found if run]


@pytest.mark.parametrize("answer", NASTY)
def test_exactly_the_answer_and_its_end_mark_are_supervised(chat, answer):
    ids, labels = chat.encode(turns("<image>\nwhat?", answer))
    (run,) = runs(ids, labels)
    assert text_of(chat.tokenizer, run) == LEAD[chat.name] + answer + END[chat.name]


@pytest.mark.parametrize("answer", NASTY)
def test_every_answer_of_a_conversation_is_supervised(chat, answer):
    ids, labels = chat.encode(turns("<image>\nwhat?", answer, "and?", "no", "more", answer))
    expected = [LEAD[chat.name] + text + END[chat.name] for text in (answer, "no", answer)]
    assert [text_of(chat.tokenizer, run) for run in runs(ids, labels)] == expected


@pytest.mark.parametrize("answer", NASTY)
def test_supervision_begins_where_the_prompt_ends(chat, answer):
    """What generation has to produce, token by token, is what is supervised: also a space that stands alone."""
    for earlier in ((), ("hi", "hello")):
        asked = turns(*earlier, "<image>\nwhat?")
        prompt = chat.prompt(asked)
        ids, labels = chat.encode([*asked, Turn("assistant", answer)])
        assert ids[: len(prompt)] == prompt
        assert labels[len(prompt)] == ids[len(prompt)]
        assert len(runs(ids[len(prompt) :], labels[len(prompt) :])) == 1
        assert len(runs(prompt, labels[: len(prompt)])) == len(earlier) / 2


@pytest.mark.parametrize("written", NASTY)
@pytest.mark.parametrize("name", ["vicuna_v1", "chat_template"])
def test_what_people_write_is_never_a_special_token(tokenizer, written, name):
    chat = ChatFormat(name, tokenizer)
    question = written.replace("<image>", "*")  # a mark in a question is an image
    ids, labels = chat.encode(turns("<image>\n" + question, written))
    expected, _ = chat.encode(turns("<image>\nwhat", "yes"))
    for number in map(tokenizer.convert_tokens_to_ids, SPECIAL):
        assert ids.count(number) == expected.count(number), tokenizer.convert_ids_to_tokens(number)
    assert f"\n{question}{'' if name == 'chat_template' else ' '}" in text_of(tokenizer, ids)
    assert len(runs(ids, labels)) == 1


def test_special_tokens_that_swallow_space_are_found_too():
    chat = ChatFormat("vicuna_v1", byte_level(AddedToken("<mask>", lstrip=True, rstrip=True, special=True)))
    mask = chat.tokenizer.convert_tokens_to_ids("<mask>")
    ids, labels = chat.encode(turns("is <mask> it", "<mask>"))
    assert mask not in ids
    (run,) = runs(ids, labels)
    assert text_of(chat.tokenizer, run) == " <mask></s>"


def test_a_special_token_that_swallows_space_leaves_the_answer_its_own():
    """As Phi-3's, whose tokens of the roles take in all space behind them."""
    tokenizer = byte_level(AddedToken("<|assistant|>", rstrip=True, special=True))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    chat = ChatFormat("chat_template", tokenizer)
    ids, labels = chat.encode(turns("what?", "\n  yes", "and?", " no"))
    assert [text_of(tokenizer, run) for run in runs(ids, labels)] == ["\n  yes<|im_end|>", " no<|im_end|>"]
    prompt = chat.prompt(turns("what?"))
    assert ids[: len(prompt)] == prompt


def test_a_text_token_stands_between_image_and_caption(tokenizer):
    chat = ChatFormat("plain", tokenizer)
    ids, labels = chat.encode(turns("Describe it.\n<image>", "a red house"))
    image = ids.index(chat.image_token_id)
    assert ids[:image] == [tokenizer.bos_token_id]
    assert text_of(tokenizer, ids[image + 1 : image + 2]) == "\n"
    assert labels[image + 1] == IGNORE_INDEX
    assert labels[image + 2] == ids[image + 2]


def test_images_are_one_token_each_where_their_marks_are(chat):
    ids, _ = chat.encode(turns("<image> and <image>", "yes", "now<image>", "no"))
    assert ids.count(chat.image_token_id) == 3


def test_a_tokenizer_without_bytes_says_unknown_for_what_it_cannot_write():
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "<image>": 2, "yes": 3}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    ids, labels = ChatFormat("vicuna_v1", words).encode(turns("<image>", "yes </s> <image> yes"))
    assert [label for label in labels if label != IGNORE_INDEX] == [3, 0, 0, 3, 1]
    assert ids.count(2) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": False}, "got none with the token <image>"),
        ({"eos_token": None}, "got no eos_token"),
        ({"single": "<s> $A </s>"}, "got eos_token after every text"),
        ({"chat_template": None}, "got chat_template, but the tokenizer has none"),
    ],
)
def test_tokenizers_that_do_not_fit_are_refused(change, message):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "yes": 3}
    core = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    single = change.get("single", "<s> $A")
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    eos = change.get("eos_token", "</s>")
    fast = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token=eos)
    if change.get("image", True):
        fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    fast.chat_template = change.get("chat_template", CHATML)
    with pytest.raises(TokenizerError, match=message):
        ChatFormat("chat_template", fast)


def test_slow_tokenizers_are_refused():
    with pytest.raises(TokenizerError, match="got object, expected a fast one, because labels need"):
        ChatFormat("plain", object())


SYSTEM = "Speak French."


@pytest.mark.parametrize("name", ["vicuna_v1", "chat_template"])
def test_a_system_prompt_takes_its_place_and_is_not_trained(tokenizer, name):
    chat = ChatFormat(name, tokenizer)
    ids, labels = chat.encode(turns("hi", "salut"), SYSTEM)
    text = text_of(tokenizer, ids)
    assert text.count(SYSTEM) == 1
    assert text.index(SYSTEM) < text.index("hi")
    assert "A chat between" not in text
    (run,) = runs(ids, labels)
    assert text_of(tokenizer, run) == LEAD[name] + "salut" + END[name]
    prompt = chat.prompt(turns("hi"), SYSTEM)
    assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize("name", ["vicuna_v1", "chat_template"])
def test_a_special_token_in_a_system_prompt_is_text(tokenizer, name):
    chat = ChatFormat(name, tokenizer)
    image = chat.image_token_id
    written, _ = chat.encode(turns("<image>", "b"), "a </s> <image> <|im_end|>")
    plain, _ = chat.encode(turns("<image>", "b"), "a")
    assert written.count(image) == plain.count(image) == 1
    assert written.count(tokenizer.eos_token_id) == plain.count(tokenizer.eos_token_id)


def test_plain_has_no_system_prompt(tokenizer):
    with pytest.raises(RowError, match="got a system prompt, which format plain does not have"):
        ChatFormat("plain", tokenizer).encode(turns("<image>", "b"), SYSTEM)


def test_a_template_without_system_prompts_refuses_the_row():
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML.replace(
        "{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"
    )
    chat = ChatFormat("chat_template", tokenizer)
    with pytest.raises(RowError, match="the chat template rewrites or drops a message"):
        chat.encode(turns("a", "b"), SYSTEM)
    assert chat.encode(turns("a", "b"))


def test_an_answer_that_is_switched_off_has_no_label(chat):
    ids, labels = chat.encode([*turns("q", "no"), Turn("user", "r"), Turn("assistant", "yes")])
    untrained = [Turn("user", "q"), Turn("assistant", "no", is_trained=False), *turns("r", "yes")]
    same, fewer = chat.encode(untrained)
    assert same == ids
    assert [text_of(chat.tokenizer, run) for run in runs(same, fewer)] == [LEAD[chat.name] + "yes" + END[chat.name]]
    assert len(runs(ids, labels)) == 2


@pytest.mark.parametrize("name", ["vicuna_v1", "chat_template"])
def test_an_escaped_mark_is_text_and_the_others_are_images(tokenizer, name):
    chat = ChatFormat(name, tokenizer)
    ids, _ = chat.encode(turns("<image>\nwhat is \\<image> ?", "a \\<image>"))
    assert ids.count(chat.image_token_id) == 1
    text = text_of(tokenizer, ids)
    assert "what is <image> ?" in text
    assert "a \\<image>" in text  # an answer is as it is written


@pytest.mark.parametrize(
    ("name", "template", "ends"),
    [
        ("vicuna_v1", CHATML, ["</s>"]),
        ("chat_template", CHATML, ["<|im_end|>", "</s>"]),
        ("chat_template", CHATML.replace("<|im_end|>\n", "</s>\n"), ["</s>"]),
        ("plain", CHATML, []),
    ],
)
def test_generation_stops_at_what_training_labels_as_the_end(tokenizer, name, template, ends):
    before = tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        assert tokenizer.convert_ids_to_tokens(ChatFormat(name, tokenizer).stop_ids) == ends
    finally:
        tokenizer.chat_template = before


def test_an_end_mark_at_which_generation_cannot_stop_is_refused():
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "### END")
    with pytest.raises(
        TokenizerError, match=r"got answers that end with .*, which cannot stop generation, expected a special token"
    ):
        ChatFormat("chat_template", tokenizer)


DATED = "{{ '<|im_start|>' + strftime_now('%d %B %Y') + '<|im_end|>' }}" + CHATML


@pytest.mark.parametrize(
    "call",
    [
        "strftime_now('%d %B %Y')",
        'strftime_now("%d %B %Y")',
        "strftime_now( '%d %B %Y' )",
        "(strftime_now('%d %B %Y') if strftime_now is defined else 'no day')",
    ],
)
def test_a_template_that_names_the_day_is_frozen(call):
    tokenizer = byte_level()
    tokenizer.chat_template = DATED.replace("strftime_now('%d %B %Y')", call)
    ids, _ = ChatFormat("chat_template", tokenizer).encode(turns("a", "b"))
    assert "26 July 2024" in text_of(tokenizer, ids)


def test_a_frozen_template_is_what_a_run_saves():
    tokenizer = byte_level()
    tokenizer.chat_template = DATED
    processor = SimpleNamespace(tokenizer=tokenizer, chat_template=DATED)
    freeze_templates(processor)
    for part in (processor, tokenizer):
        assert "strftime_now" not in part.chat_template
        assert "26 July 2024" in part.chat_template


def test_templates_by_name_are_frozen_each():
    named = {"default": DATED, "tool_use": DATED + "x"}
    processor = SimpleNamespace(tokenizer=SimpleNamespace(chat_template=None), chat_template=named)
    freeze_templates(processor)
    assert processor.chat_template == {name: freeze_template(text) for name, text in named.items()}
    assert "strftime_now" not in "".join(processor.chat_template.values())


@pytest.mark.parametrize(
    ("before", "call"),
    [
        ("{% set form = '%d' %}", "strftime_now(form)"),
        ("{% set now = strftime_now %}", "now('%d')"),
        ("{% set names = namespace(now=strftime_now) %}", "names.now('%d')"),
        ("", "(['Monday', 'Tuesday'] | random)"),
    ],
)
def test_what_changes_by_itself_and_cannot_be_frozen_is_refused(before, call):
    tokenizer = byte_level()
    tokenizer.chat_template = before + DATED.replace("strftime_now('%d %B %Y')", call)
    assert call in tokenizer.chat_template
    with pytest.raises(TokenizerError, match="depends on the day, or on chance, in a way that cannot be frozen"):
        ChatFormat("chat_template", tokenizer)


def test_a_template_may_ask_whether_the_day_is_known():
    template = "{% if strftime_now is defined %}" + DATED + "{% endif %}"
    assert "is defined" in freeze_template(template)
