"""minilm/pretrained/training_data.py: lines of JSON become the tokens that TRL makes of them; bad lines are named."""
import json

import pytest

from minilm.data import encode_dialogue, encode_prompt
from minilm.pretrained.encoding import encoding_of
from minilm.pretrained.training_data import DataError, demonstrations, pairs, prompts
from minilm.tokenizer import Tokenizer
from test_pretrained import CHAT, SHAPES, model_of

CHAT_ENCODING = encoding_of(CHAT)
SMALL = Tokenizer.train("What is 2 + 3? The answer is 5.", 300)


def user(content):
    return [{"role": "user", "content": content}]


def assistant(content):
    return [{"role": "assistant", "content": content}]


@pytest.fixture
def write(tmp_path):
    def write(*lines):
        path = tmp_path / "data.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n"
                                for line in lines), "utf-8")
        return path
    return write


def text(ids):
    return CHAT.decode(ids, specials=True)


def test_demonstrations_of_every_kind_become_prompt_and_response(write):
    path = write({"prompt": "The sky is", "completion": " blue."}, "",
                 {"prompt": user("Hi"), "completion": assistant("Hello")},
                 {"messages": user("Hi") + assistant("Yo")}, {"text": "abc"})
    found = demonstrations(CHAT_ENCODING, path, 500)
    assert found.lines == [1, 3, 4, 5] and found.notes == []
    shown = [(text(prompt), text(response)) for prompt, response in zip(found.prompts, found.responses["responses"])]
    assert shown[0] == ("The sky is", " blue.<|im_end|>")
    assert shown[1] == (CHAT.render(user("Hi")), "Hello<|im_end|>\n")
    assert shown[2][0] == "<|im_start|>" or shown[2][0] == text(CHAT.encode_chat(user("Hi"))[:1])
    assert "".join(shown[2]) == CHAT.render(user("Hi") + assistant("Yo"), answer_follows=False)
    assert "".join(shown[3]) == "abc<|im_end|>" and len(found.prompts[3]) == 1


def test_pairs_of_every_kind_become_prompt_chosen_and_rejected(write):
    path = write({"prompt": "A", "chosen": " b", "rejected": " c"},
                 {"prompt": user("A"), "chosen": assistant("b"), "rejected": assistant("c")},
                 {"chosen": user("A") + assistant("b"), "rejected": user("A") + assistant("c")},
                 {"chosen": "The sky is blue", "rejected": "The sky is red"},
                 {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go away"})
    found = pairs(CHAT_ENCODING, path, 500)
    shown = list(zip(map(text, found.prompts), *(map(text, side) for side in found.responses.values())))
    assert shown[0] == ("A", " b<|im_end|>", " c<|im_end|>")
    assert shown[1] == shown[2] == (CHAT.render(user("A")), "b<|im_end|>\n", "c<|im_end|>\n")
    assert shown[3] == ("The sky is", " blue<|im_end|>", " red<|im_end|>")
    assert shown[4] == (CHAT.render(user("Hi")), "Hello<|im_end|>\n", "Go away<|im_end|>\n")


def test_prompts_come_from_lines_of_every_kind(write):
    path = write({"prompt": "A"}, {"prompt": user("B"), "chosen": assistant("x"), "rejected": assistant("y")},
                 {"messages": user("C") + assistant("z")}, {"chosen": user("D") + assistant("b"), "rejected": user("D")
                                                            + assistant("c")})
    found = prompts(CHAT_ENCODING, path, 500)
    assert list(map(text, found.prompts)) == ["A", *(CHAT.render(user(x)) for x in "BCD")] and found.responses == {}


def test_the_small_assistant_reads_questions_and_answers(write):
    path = write({"prompt": "What is 2 + 3?", "chosen": "5.", "rejected": "Obviously. 5."},
                 {"prompt": user("What?"), "chosen": assistant("5"), "rejected": assistant("6")})
    found = pairs(encoding_of(SMALL), path, 100)
    assert found.prompts == [encode_prompt(SMALL, "What is 2 + 3?"), encode_prompt(SMALL, "What?")]
    assert found.responses["rejected"][0] == encode_dialogue(SMALL, "What is 2 + 3?", "Obviously. 5.")[1]
    with pytest.raises(DataError, match="line 1: a model of assistant.py knows one question and one answer"):
        prompts(encoding_of(SMALL), write({"prompt": user("a") + assistant("b") + user("c")}), 100)
    with pytest.raises(DataError, match="line 1: a model of assistant.py learns from one question"):
        demonstrations(encoding_of(SMALL), write({"text": "abc"}), 100)


def test_what_is_cut_or_left_out_is_counted(write):
    path = write({"prompt": "xxxx", "chosen": "y", "rejected": "z" * 30}, {"prompt": "x" * 20, "chosen": "y",
                                                                           "rejected": "z"},
                 {"prompt": "xx", "chosen": "y", "rejected": "z"})
    found = pairs(CHAT_ENCODING, path, 12)
    longest = max(len(p) + len(r) for p, r in zip(found.prompts, found.responses["rejected"]))
    assert (found.lines, longest) == ([1, 3], 12)
    assert found.notes == ["1 of 3 examples are cut at 12 tokens",
                           "1 of 3 examples are left out: longer than 12 tokens"]
    assert pairs(CHAT_ENCODING, path, 12, cut=False).lines == [3]
    assert prompts(CHAT_ENCODING, path, 12).lines == [1, 3]
    with pytest.raises(DataError, match="no example is left of 3: 3 are left out: longer than 1 tokens. Raise"):
        prompts(CHAT_ENCODING, path, 1)


def test_a_prompt_that_is_no_prefix_of_the_whole_text_loses_its_last_tokens_and_is_counted(write):
    found = pairs(CHAT_ENCODING, write({"prompt": "a in", "chosen": "g", "rejected": "x"},
                                       {"prompt": "in", "chosen": "g", "rejected": "x"}), 50)
    assert [text(prompt) for prompt in found.prompts] == ["a "]
    assert [text(response) for response in found.responses["rejected"]] == ["inx<|im_end|>"]
    assert found.notes == ["2 of 2 examples have a prompt whose last tokens merge with the response; these are left "
                           "out, as TRL does",
                           "1 of 2 examples are left out: nothing is left of the prompt or of a response"]


@pytest.mark.parametrize("line, message", [
    ("{", "line 2: not one JSON object"), ("[1]", "line 2: not one JSON object .it holds a list"),
    ("{}", "this line has nothing"),
    ('{"a": 1, "a": 2}', "line 2: not one JSON object"), ("[" * 5000, "line 2: not one JSON object"),
    ({"prompt": "a"}, 'a pair has chosen and rejected.*this line has "prompt"'),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
    ({"prompt": "a", "chosen": "b", "rejected": None}, "prompt is \"a\"; it must be a list of messages"),
    ({"prompt": [], "chosen": [], "rejected": []}, "must be a list of messages"),
    ({"prompt": [{"role": "user"}], "chosen": [], "rejected": []}, r"prompt\[0\] is .*a message has role and content"),
    ({"prompt": [3], "chosen": [], "rejected": []}, r"prompt\[0\] is 3"),
    ({"prompt": user("a"), "chosen": "b", "rejected": "c"}, 'chosen is "b"; it must be a list of messages'),
    ({"chosen": "b", "rejected": "c"}, "begin differently"), ({"chosen": 1, "rejected": 2}, "chosen is 1"),
    ({"prompt": "a\ud800", "chosen": "b", "rejected": "c"}, "lone surrogate")], ids=lambda x: str(x)[:40])
def test_a_bad_line_is_named_by_its_number_before_anything_is_trained(write, line, message):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    line = line if isinstance(line, str) else json.dumps(line)
    with pytest.raises(DataError, match=f"data.jsonl, line 2.*{message}|{message}") as found:
        pairs(CHAT_ENCODING, write(good, line, good), 100)
    assert "line 2" in str(found.value) and "\n" not in str(found.value)


def test_the_number_of_bad_lines_is_said_and_other_files_are_errors(write, tmp_path):
    with pytest.raises(DataError, match=r"line 1: .*2 more of 3 lines are bad"):
        demonstrations(CHAT_ENCODING, write({}, {}, {}), 100)
    for contents, message in ((b"", "empty"), (b"\n \n", "empty"), (b'{"text": "a"}\n\xff', "line 2: not UTF-8")):
        (tmp_path / "x").write_bytes(contents)
        with pytest.raises(DataError, match=message):
            demonstrations(CHAT_ENCODING, tmp_path / "x", 100)
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match="cannot be read"):
            demonstrations(CHAT_ENCODING, path, 100)


@pytest.mark.parity
def test_tokens_are_those_of_trls_dpo_and_sft_trainers(write, tmp_path):
    trl = pytest.importorskip("trl", reason="needs TRL: pip install trl==1.16.0")
    import datasets
    import transformers

    from minilm.pretrained import save
    save(model_of({**SHAPES["as SmolLM2"], "context": 512}), CHAT, tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.pad_token = "<|endoftext|>"
    talks = [("Hi", "Hello 12", "  Go\n"), ("한국어?", "네", "아니요 ab"), ("x the", "ing", "inging"),
             ("a ", " b", "c")]
    as_messages = [{"prompt": user(p), "chosen": assistant(c), "rejected": assistant(r)} for p, c, r in talks]
    as_strings = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in talks]
    implicit = [{"chosen": p + " x " + c, "rejected": p + " x " + r + "!"} for p, c, r in talks]
    options = {"output_dir": str(tmp_path / "out"), "report_to": [], "use_cpu": True}
    for lines in (as_messages, as_strings, implicit):
        trainer = trl.DPOTrainer(model, args=trl.DPOConfig(**options), processing_class=tokenizer,
                                 train_dataset=datasets.Dataset.from_list(lines))
        found = pairs(CHAT_ENCODING, write(*lines), 1024)
        for i, row in enumerate(trainer.train_dataset):
            assert found.prompts[i] == row["prompt_ids"]
            assert (found.responses["chosen"][i], found.responses["rejected"][i]) == (row["chosen_ids"],
                                                                                     row["rejected_ids"])
    for lines in ([{"prompt": line["prompt"], "completion": line["chosen"]} for line in as_messages],
                  [{"prompt": line["prompt"], "completion": line["chosen"]} for line in as_strings],
                  [{"messages": line["prompt"] + line["chosen"]} for line in as_messages],
                  [{"text": line["prompt"] + line["chosen"]} for line in as_strings]):
        trainer = trl.SFTTrainer(model, args=trl.SFTConfig(**options), processing_class=tokenizer,
                                 train_dataset=datasets.Dataset.from_list(lines))
        found = demonstrations(CHAT_ENCODING, write(*lines), 1024)
        for i, row in enumerate(trainer.train_dataset):
            whole = found.prompts[i] + found.responses["responses"][i]
            learned = [label for label in row["labels"][1:] if label != -100]
            assert (whole, found.responses["responses"][i]) == (row["input_ids"], learned)
