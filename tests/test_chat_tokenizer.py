"""minilm/pretrained/chat_tokenizer.py: a conversation becomes the ids of the template; a user's words stay text."""
import builtins
import json

import pytest
from hypothesis import given, strategies as st

from minilm.pretrained.byte_level import ByteLevelTokenizer, byte_characters
from minilm.pretrained.chat_tokenizer import CHATML, ChatTokenizer
from minilm.pretrained.tokenizers_package import PackageTokenizer

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SMOLLM2 = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
           "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
           "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
           "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
OTHER = ("{{ bos_token }}{% for message in messages %}{% if message['role'] not in ['user', 'assistant'] %}"
         "{{ raise_exception('only users and assistants') }}{% endif %}[{{ message['role'] | upper }}] "
         "{{ message['content'] | trim }}{{ eos_token }}{% endfor %}")
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NAMES = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}


def tokenizer(template=SMOLLM2, names=NAMES, package=False):
    text = ByteLevelTokenizer([*SPECIALS, *byte_characters().values()], [], SPECIALS)
    return ChatTokenizer(PackageTokenizer(text.to_json()) if package else text, template, names)


def user(content):
    return [{"role": "user", "content": content}]


def test_a_conversation_is_chatml_with_the_default_system_prompt_where_there_is_none():
    t = tokenizer()
    ids = t.encode_chat(user("Hi 12"))
    assert t.decode(ids, specials=True) == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        "<|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\n")
    assert ids.count(t.text.specials["<|im_start|>"]) == 3
    own = [{"role": "system", "content": "Be brief."}, *user("Hi"), {"role": "assistant", "content": "Yo"}]
    assert t.decode(t.encode_chat(own, answer_follows=False), specials=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nYo<|im_end|>\n")
    assert tokenizer(CHATML).render(user("a")) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_ids_of_the_special_tokens_have_names():
    t = tokenizer()
    assert (t.bos, t.eos, t.pad, t.ends, t.vocab_size) == (1, 2, 2, (0, 2), 259)
    assert tokenizer(names={"eos_token": "<|endoftext|>"}).bos is None
    with pytest.raises(ValueError, match="the eos_token '<end>' is no special token"):
        tokenizer(names={"eos_token": "<end>"})


@pytest.mark.parametrize("template", [SMOLLM2, OTHER], ids=["ChatML", "another"])
@given(text=st.lists(st.sampled_from([*SPECIALS, *"a \n<\ue000\ue001", "|>", "im_end"])).map("".join))
def test_names_of_special_tokens_in_a_message_stay_text(template, text):
    if template is OTHER:
        pytest.importorskip("jinja2", reason="needs jinja2: pip install jinja2")
    t = tokenizer(template)
    special = set(t.text.specials.values())
    ids = t.encode_chat(user(text))
    plain = t.encode_chat(user(text.replace("<", "(")))
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert t.decode(ids, specials=True).replace("<", "(") == t.decode(plain, specials=True).replace("<", "(")


@pytest.mark.parametrize("specials, text", [(["한"], "한 a b"), (["<|x|>", "|x|>"], "<|x|> |x|>")])
def test_names_of_one_character_or_within_each_other_stay_text_too(specials, text):
    t = ByteLevelTokenizer([*SPECIALS, *byte_characters().values(), *specials], [], [*SPECIALS, *specials])
    t = ChatTokenizer(t, CHATML, NAMES)
    ids = t.encode_chat([{"role": "user", "content": text}])
    assert not set(ids) & {t.text.specials[name] for name in specials}
    assert text in t.decode(ids, specials=True)


def test_a_model_without_a_template_has_conversations_only_if_it_has_the_tokens_of_chatml():
    assert tokenizer(None).template == CHATML
    text = ByteLevelTokenizer(["<s>", *byte_characters().values()], [], ["<s>"])
    t = ChatTokenizer(text, None, {"eos_token": "<s>"})
    with pytest.raises(ValueError, match="no chat template: it continues texts"):
        t.encode_chat(user("Hi"))
    for template, message in (([], "is a list"), (5, "is a int")):
        with pytest.raises(ValueError, match=message):
            tokenizer(template)


@pytest.mark.parametrize("template, expected", [
    ("{{ tools is none }}", "True"), ("{{ messages[0]['content'] | tojson }}", '"a<b & \'c\' 한"'),
    ("{% generation %}x{% endgeneration %}y", "xy"), ("{{ strftime_now('%%') }}", "%"),
    ("{{ pad_token }}", "<|im_end|>")])
def test_templates_have_the_functions_of_transformers(template, expected):
    pytest.importorskip("jinja2", reason="needs jinja2: pip install jinja2")
    assert tokenizer(template).render(user("a<b & 'c' 한")) == expected


def test_every_character_of_a_message_is_kept():
    t = tokenizer()
    for text in ("\ue000", "a\ue000\ue001<|im_end|>b"):
        assert f"user\n{text}<|im_end|>\n" in t.decode(t.encode_chat(user(text)), specials=True)


def test_a_role_cannot_hold_a_special_token_either():
    t = tokenizer(CHATML)
    ids = t.encode_chat([{"role": "user<|im_end|>", "content": "x"}])
    assert ids.count(t.eos) == 1


def test_jinja_gives_the_text_of_our_own_chatml():
    pytest.importorskip("jinja2", reason="needs jinja2: pip install jinja2")
    for template in (CHATML, SMOLLM2):
        for messages in (user("a"), [{"role": "system", "content": "s"}, *user(" b\n")]):
            for follows in (True, False):
                ours = tokenizer(template).render(messages, follows)
                assert ours == tokenizer(template + "{# not ChatML #}").render(messages, follows)


def test_another_template_runs_in_jinjas_sandbox_and_its_refusal_is_an_error():
    pytest.importorskip("jinja2", reason="needs jinja2: pip install jinja2")
    assert tokenizer(OTHER).render(user(" Hi ")) == "<|im_start|>[USER] Hi<|im_end|>"
    with pytest.raises(ValueError, match="fails on this conversation: only users and assistants"):
        tokenizer(OTHER).render([{"role": "system", "content": "x"}])
    for bad in ("{{ ''.__class__.__mro__ }}", "{% for %}", "{{ messages.append(1) }}", "{{ 1 / 0 }}"):
        with pytest.raises(ValueError, match="the chat template fails"):
            tokenizer(bad).render(user("x"))


def test_without_jinja_chatml_works_and_another_template_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("jinja2"):
            raise ImportError("no jinja2")
        return real(name, *arguments, **options)
    monkeypatch.setattr(builtins, "__import__", without)
    assert tokenizer().encode_chat(user("x"))
    with pytest.raises(ImportError, match="pip install jinja2"):
        tokenizer(OTHER).encode_chat(user("x"))


@pytest.mark.parametrize("messages, message", [
    ([], "at least one message"), (["hi"], "message 0 is 'hi'"), ([{"role": "user"}], "message 0"),
    ([*user("a"), {"role": "user", "content": None}], "message 1"), ([{"role": 1, "content": "a"}], "message 0")])
def test_what_is_no_conversation_is_an_error(messages, message):
    with pytest.raises(ValueError, match=message):
        tokenizer().encode_chat(messages)


def test_the_package_tokenizers_gives_the_same_ids():
    pytest.importorskip("tokenizers", reason="needs tokenizers: pip install tokenizers")
    for text in ("Hi 12", "a <|im_end|> b", "한국어\n"):
        assert tokenizer(package=True).encode_chat(user(text)) == tokenizer().encode_chat(user(text))
    with pytest.raises(ValueError, match="the package tokenizers"):
        PackageTokenizer("{}")


def test_the_package_neither_cuts_nor_fills_and_knows_the_tokens_that_the_checkpoint_names():
    pytest.importorskip("tokenizers", reason="needs tokenizers: pip install tokenizers")
    saved = json.loads(tokenizer().text.to_json())
    saved["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    saved["padding"] = {"strategy": {"Fixed": 6}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                        "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    saved["added_tokens"][2]["special"] = False
    package = ChatTokenizer(PackageTokenizer(json.dumps(saved), NAMES.values()), SMOLLM2, NAMES)
    assert package.encode_chat(user("Hi 12")) == tokenizer().encode_chat(user("Hi 12")) and package.eos == 2
