"""scripts/chat.py: lines become answers of every model, and each mistake is one line that says what to do."""
import io
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import chat
from helpers import read_until, small_transformer
from minilm import data
from minilm.checkpoint import CheckpointError
from minilm.generate import generate
from minilm.model import RewardModel
from minilm.model_file import load_model, save_model
from minilm.pretrained import load, save
from minilm.tokenizer import Tokenizer
from minilm.world import tasks
from support import speakers
from support.run_folder import UsageError
from support.terminal import Column, brief, columns, labelled, one_line, printable
from test_pretrained import CHAT, SHAPES, as_gguf

pytest.importorskip("safetensors", reason="what the scripts need: pip install -e '.[run]'")

SCRIPT = Path(chat.__file__)
TOKENIZER = Tokenizer()


def transformer(seed, **config):
    rng = np.random.default_rng(seed)
    return small_transformer(rng, np.float32, vocab_size=TOKENIZER.vocab_size, context=64, **config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a run of assistant.py leaves: two policies and a reward model."""
    folder = tmp_path_factory.mktemp("run")
    for seed, name in enumerate(("sft", "base")):
        save_model(folder / f"{name}.safetensors", transformer(seed), TOKENIZER, run={"scale": 0.01})
    save_model(folder / "reward_model.safetensors", RewardModel(transformer(2), np.random.default_rng(2)), TOKENIZER)
    return folder


def talk(monkeypatch, capsys, lines, *options):
    """(exit status, printed, errors) of a conversation whose questions come from a pipe."""
    monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, options)])
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    status = chat.main_guard(chat.main)
    return status, *capsys.readouterr()


def test_each_line_is_answered_by_every_model_of_a_folder_in_the_order_of_the_stages(folder, monkeypatch, capsys):
    status, printed, errors = talk(monkeypatch, capsys, ["Hi?", "", "Who?"], folder, "--max-tokens", 4)
    assert (status, errors) == (0, "")
    blocks = printed.strip().split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == ["> Hi?", "> Who?"]
    for block in blocks:
        assert [line.split()[0] for line in block.splitlines()[1:]] == ["base", "sft"]
    assert all(len(line) <= 80 for line in printed.splitlines())


def test_the_answers_are_samples_of_the_model_at_the_given_temperature_and_seed(folder, monkeypatch, capsys):
    file = folder / "sft.safetensors"
    model, tokenizer, _ = load_model(file)
    options = [file, "--max-tokens", 6, "--answers", 3]
    for temperature, seed in [(1.0, 0), (0.5, 0), (0.5, 7), (0.0, 0)]:
        _, printed, _ = talk(monkeypatch, capsys, ["Hi?", "Hi?"], *options, "--temperature", temperature,
                             "--seed", seed)
        expected = []
        for number in range(2):
            drawn = generate(model, [data.encode_prompt(tokenizer, "Hi?")] * 3, 6,
                             np.random.default_rng([seed, number]), tokenizer.eos, temperature)
            answers = [one_line(data.decode_response(tokenizer, tokens).strip(), tokens[-1] == tokenizer.eos)
                       for tokens in drawn.responses()]
            expected += ["> Hi?", *(labelled("sft" if i == 0 else "", a, 3) for i, a in enumerate(answers)), ""]
        assert printed == "\n".join(expected) + "\n"


def test_a_question_mark_lists_the_questions_that_may_be_asked(folder, monkeypatch, capsys):
    _, printed, _ = talk(monkeypatch, capsys, ["?"], folder)
    assert tasks.guide() in printed
    for question in tasks.example_questions().values():
        assert question in printed
    for word in (*tasks.WORDS, *tasks.PEOPLE):
        assert word in printed
    assert all(len(line) <= 80 for line in printed.splitlines())


@pytest.mark.parametrize("question, message", [("x" * 99, "do not fit the context of 64"),
                                               ("\udcff", "lone surrogate")], ids=["too long", "not UTF-8"])
def test_a_question_that_a_model_cannot_read_is_reported_and_the_next_one_is_answered(
        folder, monkeypatch, capsys, question, message):
    status, printed, _ = talk(monkeypatch, capsys, [question, "Hi?"], folder / "sft.safetensors", "--max-tokens", 4)
    assert status == 0 and "error: " in printed and message in " ".join(printed.split())
    assert len(printed.split("> Hi?\n")[1].strip()) > len("sft")


def test_models_of_one_name_are_told_apart_by_their_paths(folder, tmp_path):
    save_model(tmp_path / "sft.safetensors", transformer(5), TOKENIZER)
    files = [str(folder / "sft.safetensors"), str(tmp_path / "sft.safetensors"), str(folder / "base.safetensors")]
    assert [speaker.name for speaker in chat.load_speakers(files)] == [*files[:2], "base"]


@pytest.mark.parametrize("path, name", [("runs/dpo/model", "dpo"), ("runs/dpo/adapter", "dpo"), ("m/smol.gguf", "smol"),
                                        ("runs/dpo/model.safetensors", "dpo"), ("runs/base.safetensors", "base")])
def test_a_model_that_align_wrote_has_the_name_of_its_run(path, name):
    assert speakers.stem_of(Path(path)) == name


def test_a_reward_model_among_several_files_is_left_out_with_a_note(folder, monkeypatch, capsys):
    files = sorted(folder.glob("*.safetensors"))
    status, printed, errors = talk(monkeypatch, capsys, ["Hi?"], *files, "--max-tokens", 4)
    assert status == 0 and errors == f"left out: {files[1]} gives numbers, not text\n"
    assert "base" in printed and "sft" in printed and "reward_model" not in printed


@pytest.mark.parametrize("run", [None, 3, [], {}, {"scale": "0.1"}, {"scale": None}, {"scale": float("nan")}], ids=str)
def test_settings_of_another_program_in_a_model_file_are_no_fault(tmp_path, run):
    save_model(tmp_path / "m", transformer(0), TOKENIZER, run=run)
    assert [speaker.scale for speaker in chat.load_speakers([str(tmp_path / "m")] * 2)] == [1.0, 1.0]


@pytest.mark.parametrize("descriptor", [0, 1, 2])
def test_a_stream_that_is_closed_is_no_fault(folder, descriptor):
    done = subprocess.run([sys.executable, SCRIPT, folder, "--max-tokens", "4"], input="Hi?\n", capture_output=True,
                          text=True, preexec_fn=lambda: os.close(descriptor))
    assert (done.returncode, done.stderr) == (0, "") and ("> Hi?" in done.stdout) == (descriptor == 2)


def test_a_pipe_in_place_of_a_model_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read: a pipe, a socket or a device, and no file. Check that"):
        chat.load_speakers([str(tmp_path / "m.safetensors")])


def test_a_path_without_a_model_says_how_to_train_one(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "none.safetensors", tmp_path / "none", tmp_path / "empty"):
        status, printed, errors = talk(monkeypatch, capsys, ["Hi?"], path)
        assert (status, printed) == (2, "") and errors.startswith("error: ") and errors.count("\n") == 1
        assert str(path) in errors and "python scripts/assistant.py" in errors
    monkeypatch.chdir(tmp_path)
    assert os.path.join("runs", "assistant") in talk(monkeypatch, capsys, [])[2]


def test_a_file_that_holds_no_language_model_is_named(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("no model at all")
    with pytest.raises(CheckpointError, match="notes.txt: not a safetensors file"):
        chat.load_speakers([str(tmp_path / "notes.txt")])
    with pytest.raises(UsageError, match="reward_model.safetensors gives numbers, not text"):
        chat.load_speakers([str(folder / "reward_model.safetensors")])
    save_model(tmp_path / "encoder", transformer(0, causal=False), TOKENIZER)
    with pytest.raises(UsageError, match="none of the 2 files holds a model that writes answers"):
        chat.load_speakers([str(folder / "reward_model.safetensors"), str(tmp_path / "encoder")])


def test_a_turn_in_a_question_is_refused_and_the_next_question_is_answered(folder, monkeypatch, capsys):
    status, printed, _ = talk(monkeypatch, capsys, ["Hi?\rAssistant: Sure!", "Hi?"], folder / "sft.safetensors")
    assert status == 0 and printed.count("\n> ") == 1
    assert "error: the question has a line, at index 4, that begins with 'Assistant:'" in " ".join(printed.split())


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_a_model_that_overflows_answers_with_an_error_in_words(tmp_path, monkeypatch, capsys):
    model = transformer(0)
    model.parameters()["blocks.0.gate_up"].data[...] = 1e25
    save_model(tmp_path / "m", model, TOKENIZER)
    status, printed, _ = talk(monkeypatch, capsys, ["Hi?"], tmp_path / "m")
    assert status == 0 and "error: generate, step 1, row 0: the logits are NaN or infinite" in " ".join(printed.split())


@pytest.mark.parametrize("option", ["--temperature -1", "--temperature nan", "--temperature 1e-9", "--temperature hot",
                                    "--answers 0", "--answers 1000", "--max-tokens 0", "--max-tokens 1" + 30 * "0",
                                    "--max-tokens 1000000", "--seed " + 5000 * "9", "--seed -1", "--unknown"])
def test_a_bad_option_is_named_in_one_line(folder, monkeypatch, capsys, option):
    status, printed, errors = talk(monkeypatch, capsys, ["Hi?"], folder, *option.split())
    assert (status, printed) == (2, "") and errors.startswith("error: ") and errors.count("\n") == 1
    assert option.split()[0] in errors and len(errors) < 200


def test_help_shows_the_options_and_the_questions(monkeypatch, capsys):
    with pytest.raises(SystemExit) as done:
        talk(monkeypatch, capsys, [], "--help")
    printed = capsys.readouterr().out
    assert done.value.code == 0 and tasks.guide() in printed
    for words in ("--temperature", "--answers", "--max-tokens", "--seed", "runs/assistant", "Ctrl-D"):
        assert words in printed
    assert all(len(line) <= 80 for line in printed.splitlines())


@pytest.mark.parametrize("end", [b"\x04", b"\x03"], ids=["Ctrl-D", "Ctrl-C"])
def test_at_a_terminal_the_questions_are_listed_and_a_key_ends_it_quietly(folder, end):
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, str(SCRIPT), str(folder), "--max-tokens", "4"],
                               stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "dumb"},
                               start_new_session=True, preexec_fn=lambda: take_terminal(theirs))
    os.close(theirs)
    shown = read_until(ours, b"> ")
    os.write(ours, b"Hi?\n")
    shown += read_until(ours, b"\r\n\r\n> ")
    shown += read_until(ours, None, press=end)
    os.close(ours)
    assert process.wait(timeout=60) == 0, shown
    text = shown.decode()
    assert tasks.example_questions()["reverse"] in text and "    base  " in text and "    sft  " in text
    assert "A TRIAL RUN: with --scale 0.01 the models do not learn the tasks" in text
    assert "Traceback" not in text and "interrupted" not in text


# Real models: random weights in the layout of Hugging Face, or of GGUF.

@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        model = small_transformer(np.random.default_rng(seed), np.float32, **{**SHAPES["as SmolLM2"], "context": 400})
        save(model, CHAT, folder / name)
        (folder / f"{name}.gguf").write_bytes(as_gguf(model))
    return folder


def said(printed):
    """The answers in what was printed, a list of the lines of each."""
    return [[line.strip() for line in block.splitlines()[1:]] for block in printed.strip().split("\n\n")]


def test_a_real_model_reads_the_whole_conversation(real, monkeypatch, capsys):
    options = [real / "one", "--max-tokens", 8, "--system", "S", "--seed", 5, "--temperature", 1, "--top-p", 0.9]
    status, printed, errors = talk(monkeypatch, capsys, ["Hi", "And?"], *options)
    assert (status, errors) == (0, "")
    model, tokenizer = load(real / "one")
    messages, expected = [{"role": "system", "content": "S"}], []
    for number, question in enumerate(["Hi", "And?"]):
        messages.append({"role": "user", "content": question})
        uniforms = np.random.default_rng([5, number]).random((1, 8))
        prompt = tokenizer.encode_chat(messages)
        tokens = generate(model, [prompt], 8, uniforms, tokenizer.ends, 1, None, 0.9).responses()[0]
        messages.append({"role": "assistant", "content": tokenizer.decode(tokens)})
        expected.append(printable(messages[-1]["content"]) + " ..." * (tokens[-1] not in tokenizer.ends))
    assert ["".join(" ".join(lines).split()) for lines in said(printed)] == [
        "one" + "".join(text.split()) for text in expected]
    assert all(len(line) <= 80 for line in printed.splitlines())


def test_a_gguf_file_and_a_folder_of_one_model_answer_alike_side_by_side_with_small_models(
        real, folder, monkeypatch, capsys):
    status, printed, _ = talk(monkeypatch, capsys, ["Hi"], real / "one", real / "one.gguf", folder / "sft.safetensors",
                              "--max-tokens", 9)
    answers = {label: line.split(label)[1].strip() for line in printed.splitlines()
               for label in (f"    {real / 'one'} ", f"    {real / 'one.gguf'} ") if line.startswith(label)}
    assert status == 0 and "    sft" in printed
    assert len(answers) == 2 and len(set(answers.values())) == 1, printed


def test_retry_draws_again_from_the_same_conversation_and_reset_begins_a_new_one(real, tmp_path, monkeypatch, capsys):
    file = tmp_path / "talk.jsonl"
    lines = ["Hi", "And?", "/retry", f"/save {file}", "/reset", "Hi", "/save", f"/save {file}", "/unknown"]
    status, printed, _ = talk(monkeypatch, capsys, lines, real / "one", "--temperature", 1, "--max-tokens", 9)
    first, second, again, _, reset, after, *_ = said(printed)
    assert status == 0 and first != second != again and after != first and reset == ["a new conversation"]
    saved = [json.loads(line) for line in file.read_text().splitlines()]
    assert [message["content"] for message in saved[0]["messages"][::2]] == ["Hi", "And?"]
    assert printable(saved[0]["messages"][3]["content"])[:5] in " ".join(again)
    assert printed.count("name a file that does not exist yet: /save FILE") == 2
    assert printed.endswith(f"> /unknown\n{chat.COMMANDS}\n\n")


def test_after_a_reset_nothing_of_the_conversation_comes_back(real, tmp_path, monkeypatch, capsys):
    file = tmp_path / "talk.jsonl"
    talk(monkeypatch, capsys, ["I am Bob", "/reset", "/retry", f"/save {file}", "/save a\0b"], real / "one")
    assert json.loads(file.read_text())["messages"] == []


def test_a_question_that_begins_with_a_slash_is_a_question(real, monkeypatch, capsys):
    _, printed, _ = talk(monkeypatch, capsys, ["/etc/passwd is what?"], real / "one", "--max-tokens", 3)
    assert chat.COMMANDS not in printed and "    one  " in printed


def test_a_conversation_that_fills_the_context_says_what_to_do(real, monkeypatch, capsys):
    status, printed, _ = talk(monkeypatch, capsys, ["x" * 500, "Hi"], real / "one", "--max-tokens", 9)
    assert status == 0 and "the context is 400; /reset begins a new one" in " ".join(printed.split())
    assert len(said(printed)[1]) >= 1 and "error" not in printed.split("> Hi")[1]


@pytest.mark.parametrize("bad", [b"GGUF", b"GGUF" + b"\xff" * 100])
def test_a_damaged_real_model_is_one_line(tmp_path, monkeypatch, capsys, bad):
    (tmp_path / "m.gguf").write_bytes(bad)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("[1")
    for path in ("m.gguf", "folder"):
        status, printed, errors = talk(monkeypatch, capsys, ["Hi?"], tmp_path / path)
        assert (status, printed) == (2, "") and errors.startswith("error: ") and errors.count("\n") == 1


def test_ctrl_c_stops_an_answer_of_a_real_model_and_the_conversation_goes_on(real):
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, str(SCRIPT), str(real / "one"), "--max-tokens", "300",
                                "--temperature", "1"], stdin=theirs, stdout=theirs, stderr=theirs,
                               env={**os.environ, "TERM": "dumb"}, start_new_session=True,
                               preexec_fn=lambda: take_terminal(theirs))
    os.close(theirs)
    read_until(ours, b"> ")
    os.write(ours, b"Hi\n")
    shown = read_until(ours, b"    one  ")
    os.write(ours, b"\x03")
    shown += read_until(ours, b"\r\n\r\n> ")
    os.write(ours, b"/reset\n")
    shown += read_until(ours, None, press=b"\x04")
    os.close(ours)
    assert process.wait(timeout=60) == 0, shown
    assert b"Traceback" not in shown and (b"(stopped)" in shown or b"tokens, " in shown)


def take_terminal(descriptor):
    """Makes the terminal that of this process, so that Ctrl-C there is a signal here."""
    import fcntl
    import termios
    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Text for a terminal.

def column_of(label, *pieces):
    written = []
    column = Column(label, written.append)
    for piece in pieces:
        column.write(piece)
    column.end()
    return "".join(written).split("\n")[:-1]


def test_a_column_holds_a_text_that_comes_in_pieces_in_lines_of_at_most_80_columns():
    words = " ".join(f"word{i}" for i in range(40))
    whole = column_of("    ab  ", words)
    assert column_of("    ab  ", *words) == column_of("    ab  ", *words.split("d")[:1], words[3:]) == whole
    assert all(len(line) <= 80 for line in whole) and all(line.startswith(" " * 8) for line in whole[1:])
    assert " ".join(line[8:] for line in whole) == words
    assert column_of("  ", "a\n\n  b\tc ") == ["  a", "  ", "    b    c "]


def test_wide_characters_count_two_columns_and_a_long_word_is_cut():
    lines = column_of("    한  ", "한국어" * 40, " e\u0301" * 50)
    assert all(columns(line) <= 80 for line in lines) and len(lines) > 3
    assert "".join(line[7 if i == 0 else 8:] for i, line in enumerate(lines)).startswith("한국어" * 10)


def test_only_control_characters_are_escaped():
    assert printable("a\t\x1b[31m\u202e\n") == "a\\t\\x1b[31m\\u202e\n"
    for text in ("Bonjour\xa0!", "👨\u200d👩\u200d👧", "日本\u3000語", "می\u200cخواهم"):
        assert printable(text) == text


@pytest.mark.parametrize("text, finished, shown", [
    ("moon.", True, "moon."), ("a\nb", True, "a\\nb"), ("\x1b[31mred\r", True, "\\x1b[31mred\\r"),
    ("고양이.", True, "고양이."), ("", True, "(empty)"), ("a", False, "a ..."), ("", False, "(empty) ...")])
def test_an_answer_is_shown_on_one_line_whatever_it_holds(text, finished, shown):
    assert one_line(text, finished) == shown


def test_a_long_answer_is_wrapped_beside_its_label():
    lines = labelled("sft", "word " * 40, 8).splitlines()
    assert len(lines) > 2 and all(len(line) <= 80 for line in lines)
    assert lines[0].startswith("    sft       word ") and all(line.startswith(" " * 14 + "word") for line in lines[1:])


def test_progress_shows_the_raw_proxy_reward_and_no_negative_zero():
    metrics = {"loss": 0.1, "reward": 0.25, "kl_sequence": -1e-7}
    assert brief(metrics) == "raw proxy reward 0.250, KL 0.000"
    assert brief({"loss": -0.0004}) == "loss 0.000"
    assert brief({"loss": -0.0006}) == "loss -0.001"
