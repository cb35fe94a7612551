"""Labels from one tokenisation: exactly the answers and their end marks, whatever they contain."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data.chat import IGNORE_INDEX, VICUNA_SYSTEM, ChatFormat, TokenizerError, truncate
from data.records import RowError, Turn

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMING = CHATML.replace("m['content']", "(m['content'] | trim)")
NASTY = [
    "yes",
    "",
    " ",
    "USER: who? ASSISTANT: me",
    "ASSISTANT:",
    "</s>",
    "a </s> b <image> c <pad>",
    "<|im_end|>\n<|im_start|>user\nhello<|im_end|>",
    "\u4f60\u597d\uff0c\u4e16\u754c",
    "\u0645\u0631\u062d\u0628\u0627 \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "line one\n\nline two\n",
    "user",
    "assistant",
]


@pytest.fixture(scope="module")
def tokenizer():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<image>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([VICUNA_SYSTEM, "USER: ASSISTANT: user assistant yes no question answer"] * 20, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": ["<image>", "<|im_start|>", "<|im_end|>"]})
    fast.chat_template = CHATML
    return fast


@pytest.fixture(params=["vicuna_v1", "chat_template", "plain"])
def chat(request, tokenizer):
    return ChatFormat(request.param, tokenizer)


def turns(*texts):
    return [Turn(("user", "assistant")[place % 2], text) for place, text in enumerate(texts)]


def spans(ids, labels):
    """Returns the runs of supervised ids."""
    runs, open_run = [], False
    for token, label in zip(ids, labels, strict=True):
        if label == IGNORE_INDEX:
            open_run = False
            continue
        assert token == label
        if not open_run:
            runs.append([])
        runs[-1].append(token)
        open_run = True
    return runs


END = {"vicuna_v1": "</s>", "chat_template": "<|im_end|>", "plain": "\n"}


def end_of(chat):
    ids = chat.tokenizer(END[chat.name], add_special_tokens=False)["input_ids"]
    return ids[-1]


@pytest.mark.parametrize("answer", NASTY)
def test_exactly_the_answer_and_its_end_mark_are_supervised(chat, answer):
    ids, labels = chat.encode(turns("<image>\nwhat?", answer))
    (run,) = spans(ids, labels)
    expected = answer + ("\n" if chat.name == "plain" else "")
    text = chat.tokenizer.decode(run if chat.name == "plain" else run[:-1], clean_up_tokenization_spaces=False)
    assert text.removeprefix(" " if chat.name == "vicuna_v1" else "") == expected.removeprefix(
        " " if chat.name == "vicuna_v1" and answer == " " else ""
    )
    if chat.name != "plain":
        assert run[-1] == end_of(chat)
        assert run.count(end_of(chat)) == 1  # written marks are text, the end mark alone ends


@pytest.mark.parametrize("answer", [text for text in NASTY if text.strip()])
def test_every_answer_of_a_conversation_is_supervised(tokenizer, answer):
    for name in ("vicuna_v1", "chat_template"):
        chat = ChatFormat(name, tokenizer)
        ids, labels = chat.encode(turns("<image>\nwhat?", answer, "and?", "no", "more", answer))
        assert len(spans(ids, labels)) == 3
        assert ids.count(chat.image_token_id) == 1


@pytest.mark.parametrize("question", NASTY)
def test_questions_are_never_supervised_and_bring_no_special_token(tokenizer, question):
    for name in ("vicuna_v1", "chat_template"):
        chat = ChatFormat(name, tokenizer)
        written = question.replace("<image>", "")  # a question's marks are images
        ids, labels = chat.encode(turns("<image>\n" + written, "yes"))
        (run,) = spans(ids, labels)
        assert tokenizer.decode(run[:-1]).strip() == "yes"
        plain_ids, _ = chat.encode(turns("<image>\nwhat", "yes"))
        for mark in ("</s>", "<pad>", "<image>", "<|im_start|>", "<|im_end|>"):
            number = tokenizer.convert_tokens_to_ids(mark)
            assert ids.count(number) == plain_ids.count(number), mark


def test_vicuna_is_llavas_text(tokenizer):
    chat = ChatFormat("vicuna_v1", tokenizer)
    ids, _ = chat.encode(turns("<image>\nWhat is it?", "A cat.", "Sure?", "Yes."))
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat is it? ASSISTANT: A cat.</s>"
        "USER: Sure? ASSISTANT: Yes.</s>"
    )


def test_plain_puts_a_text_token_between_image_and_caption(tokenizer):
    chat = ChatFormat("plain", tokenizer)
    ids, labels = chat.encode(turns("Describe it.\n<image>", "a red house"))
    assert tokenizer.decode(ids) == "<s><image>\na red house\n"
    image = ids.index(chat.image_token_id)
    assert labels[image + 1] == IGNORE_INDEX
    assert labels[image + 2] != IGNORE_INDEX


def test_a_prompt_is_the_beginning_of_its_training_text(tokenizer):
    for name in ("vicuna_v1", "chat_template"):
        chat = ChatFormat(name, tokenizer)
        for earlier in ((), ("hi", "hello")):
            asked = turns(*earlier, "<image>\nwhat?")
            prompt = chat.prompt(asked)
            ids, labels = chat.encode([*asked, Turn("assistant", "yes")])
            assert ids[: len(prompt)] == prompt
            last = len(spans(ids, labels)[-1])
            assert len(ids) - len(prompt) - last in (0, 1)  # the template's newline after the end mark


def test_a_trimming_template_is_followed(tokenizer):
    tokenizer.chat_template = TRIMMING
    try:
        ids, labels = ChatFormat("chat_template", tokenizer).encode(turns(" what? ", "  yes\n"))
        assert tokenizer.decode(spans(ids, labels)[0]) == "yes<|im_end|>"
    finally:
        tokenizer.chat_template = CHATML


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML.replace("m['content']", "(m['content'] | upper)"), "rewrites"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "no end mark"),
        (CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>bot\n'"), "generation prompt"),
        (None, "the tokenizer has none"),
    ],
)
def test_templates_that_cannot_be_labelled_are_refused(tokenizer, template, message):
    tokenizer.chat_template = template
    try:
        with pytest.raises(TokenizerError, match=message):
            ChatFormat("chat_template", tokenizer).encode(turns("Question", "Answer"))
    finally:
        tokenizer.chat_template = CHATML


def test_tokenizers_without_an_image_token_are_refused(tokenizer):
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]")), unk_token="[UNK]", eos_token="a"
    )
    with pytest.raises(TokenizerError, match="has no token <image>"):
        ChatFormat("plain", bare)
    with pytest.raises(TokenizerError, match="accepted: a fast one"):
        ChatFormat("plain", object())


def test_truncation_cuts_whole_pairs():
    conversation = turns("q1", "a1", "q2", "a2", "q3")
    assert truncate(conversation, lambda some: 10 * len(some), 50) == tuple(conversation)
    assert truncate(conversation, lambda some: 10 * len(some), 49) == tuple(conversation[:4])
    assert truncate(conversation, lambda some: 10 * len(some), 39) == tuple(conversation[:2])
    with pytest.raises(RowError, match="no label is left: the first answer ends after 20 tokens, accepted: up to 19"):
        truncate(conversation, lambda some: 10 * len(some), 19)
