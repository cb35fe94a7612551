"""Chat templates of the world: what they call an answer, and which of them cannot be trained on."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from data.chat import ChatTemplate, TokenizerError
from data.rows import RowError, Turn

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' </s>' }}{% endif %}{% endfor %}"
)
GENERATION = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'user: ' + m['content'] + ' assistant: ' }}{% else %}"
    "{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}{{ ' ' }}{% endif %}{% endfor %}"
)
WORDS = (  # marks that the tokenizer does not know as special
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n### END\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
THINKING = CHATML.replace(
    "+ m['content'] +",
    "+ ('<think>\n</think>\n' if loop.last and m['role'] == 'assistant' else '') + m['content'] +",
)
CLOSED_LATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + m['content'] }}{% endfor %}"
    "{{ '<|start|>assistant' if add_generation_prompt else '<|eot|>' }}"
)


@pytest.fixture
def make():
    def making(template):
        core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, "<unk>"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
        special = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        tokenizer.chat_template = template
        return ChatTemplate(tokenizer)

    return making


def turns(*texts):
    return [Turn(("user", "assistant")[place % 2], text) for place, text in enumerate(texts)]


ANSWERS = [
    (CHATML, "yes<|im_end|>"),
    (LLAMA3, "yes<|eot|>"),  # the next header follows without a space: it is no part of the answer
    (MISTRAL, " yes </s>"),  # the prompt ends before the space
    (GENERATION, "yes</s>"),
    (WORDS, "yes\n### END"),
]


@pytest.mark.parametrize(("template", "answer"), ANSWERS)
@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_an_answer_goes_from_its_prompt_to_its_end_mark(make, template, answer, pairs):
    chat = make(template)
    conversation = turns(*["what?", "yes"] * pairs)
    rendered = chat.render(conversation)
    assert [rendered.text[start:end] for start, end in rendered.answers] == [answer] * pairs
    for pair in range(pairs):
        prompt = chat.render(conversation[: 2 * pair + 1])
        assert rendered.text.startswith(prompt.text)
        assert len(prompt.text) == rendered.answers[pair][0]
        assert len(prompt.answers) == pair


@pytest.mark.parametrize("template", [template for template, _ in ANSWERS])
def test_the_text_is_the_tokenizers_own(make, template):
    chat = make(template)
    conversation = turns(" <image>\nhi ", "\tyes\n", "", "", "<|im_end|>", "</s> <|eot|> {{ x }} {% y %}")
    messages = [{"role": turn.role, "content": turn.text} for turn in conversation]
    rendered = chat.render(conversation)
    assert rendered.text == chat._tokenizer.apply_chat_template(messages, tokenize=False)
    written = [rendered.text[start:end] for start, end in rendered.user_spans]
    assert written[-2:] == ["<|im_end|>", "</s> <|eot|> {{ x }} {% y %}"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the tokenizer has none, expected vicuna_v1"),
        ("{{ raise_exception('no') }}", "fails: no, expected one that"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError: division by zero, expected one that"),
        ("{{ 'a' + 1 }}", "fails: TypeError: "),
        ("{% include 'x' %}", "fails: TypeError: no loader for this environment"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "fails: RecursionError: "),
        ("{{ cycler() }}", "fails: RuntimeError: "),
        ("{{ [].pop() }}", "fails: "),
        ("{{ 10 ** 5000 }}", "fails: ValueError: "),
        ("{{ 10.0 ** 400 }}", "fails: OverflowError: "),
        ("{% for a in [1] %}" * 25 + "{% endfor %}" * 25, "fails: SyntaxError: too many statically nested blocks"),
        ("{{ x", "fails: "),
        ({"tool_use": CHATML}, "multiple chat templates with no default"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "rewrites or drops a message"),
        ("{{ messages[0]['content'] }}", "rewrites or drops a message"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "no end mark follows an answer"),
        (CLOSED_LATE, "no end mark follows an answer"),
        (CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>bot\n'"), "does not follow the generation prompt"),
        (THINKING, "the last answer begins differently"),
    ],
)
def test_templates_that_cannot_be_trained_on_are_refused(make, template, message):
    with pytest.raises(TokenizerError, match=message) as caught:
        make(template)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML.replace("m['content']", "m['content'].split('</think>')[-1]"), "rewrites the message"),
        ("{% if messages[0]['content'] == 'BAD' %}{{ raise_exception('no') }}{% endif %}" + CHATML, "fails: no"),
        ("{% if messages[0]['content'] == 'BAD' %}{{ 1 / 0 }}{% endif %}" + CHATML, "fails: ZeroDivisionError"),
    ],
)
def test_one_conversation_that_a_template_rewrites_is_a_fault_of_its_row(make, template, message):
    chat = make(template)
    chat.render(turns("fine", "answer"))
    with pytest.raises(RowError, match=message):
        chat.render(turns("BAD", "<think>hm</think>answer"))
