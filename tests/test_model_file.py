"""minilm/model_file.py: a model is read exactly as it was saved, or the file is an error."""
import dataclasses

import numpy as np
import pytest

from helpers import small_transformer
from minilm.checkpoint import CheckpointError, load, save
from minilm.model import RewardModel
from minilm.model_file import RESERVED, load_model, save_model
from minilm.tokenizer import Tokenizer

pytest.importorskip("safetensors")

TOKENIZER = Tokenizer.train("a cat and a cat", 262)
TOKENS = np.array([[3, 1, 4, 1, 5]])


def transformer(dtype=np.float32, **config):
    return small_transformer(np.random.default_rng(0), dtype, vocab_size=TOKENIZER.vocab_size, **config)


def reward_model(**config):
    return RewardModel(transformer(**config), np.random.default_rng(1))


@pytest.fixture
def saved(tmp_path):
    save_model(tmp_path / "model", transformer(), TOKENIZER)
    return tmp_path / "model"


@pytest.mark.parametrize("make", [transformer, reward_model])
@pytest.mark.parametrize("config", [{}, {"tied": True}, {"key_smear": True, "kv_heads": 1, "dtype": np.float64},
                                    {"causal": False, "rope_pairing": "interleaved", "rope_base": 500.5}],
                         ids=["plain", "tied", "smeared", "encoder"])
def test_a_model_is_read_back_bitwise_with_its_config_and_tokenizer(tmp_path, make, config):
    model = make(**config)
    save_model(tmp_path / "model", model, TOKENIZER, stage="rlhf", steps=3)
    loaded, tokenizer, metadata = load_model(tmp_path / "model")

    assert type(loaded) is type(model) and (metadata["stage"], metadata["steps"]) == ("rlhf", 3)
    before, after = model.parameters(), loaded.parameters()
    assert list(before) == list(after)
    for name in before:
        assert before[name].dtype == after[name].dtype and after[name].requires_grad
        assert before[name].data.tobytes() == after[name].data.tobytes(), name
    assert getattr(loaded, "transformer", loaded).config == getattr(model, "transformer", model).config
    assert tokenizer.to_json() == TOKENIZER.to_json()
    if make is transformer:
        assert (loaded(TOKENS).data == model(TOKENS).data).all()
    else:
        assert (loaded.rewards(TOKENS, TOKENS > 0).data == model.rewards(TOKENS, TOKENS > 0).data).all()


@pytest.mark.parametrize("name", RESERVED)
def test_a_reserved_name_of_metadata_is_refused_before_anything_is_written(tmp_path, name):
    given = {"path": tmp_path / "model", "model": transformer(), "tokenizer": TOKENIZER}
    with pytest.raises((TypeError, ValueError), match=name):
        save_model(**given, **{name: "ablation 3"}) if name not in given else save_model(*given.values(), tokenizer="x")
    assert not (tmp_path / "model").exists()
    save_model(*given.values())
    assert sorted(load_model(tmp_path / "model")[2]) == sorted(RESERVED)


@pytest.mark.parametrize("make", [transformer, reward_model])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused_with_their_tensor_and_loaded_when_asked_for(tmp_path, make, bad):
    for name in make().parameters():
        model = make()
        model.parameters()[name].data.reshape(-1)[-1] = bad
        save_model(tmp_path / "model", model, TOKENIZER)
        with pytest.raises(CheckpointError, match=f"model: .*{name}, .* is {bad}; it must be finite"):
            load_model(tmp_path / "model")
        loaded = load_model(tmp_path / "model", finite=False)[0].parameters()[name].data
        assert loaded.tobytes() == model.parameters()[name].data.tobytes()


def test_a_file_cut_short_is_an_error(saved):
    saved.write_bytes(saved.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="model: cut short or damaged"):
        load_model(saved)


def test_a_file_that_is_no_checkpoint_is_an_error(tmp_path):
    (tmp_path / "notes.txt").write_text("no model at all")
    with pytest.raises(CheckpointError, match="notes.txt: not a safetensors file"):
        load_model(tmp_path / "notes.txt")


def respell(path, **changes):
    """The same arrays with metadata of their own: None leaves a field out."""
    arrays, metadata = load(path)
    metadata = {name: value for name, value in {**metadata, **changes}.items() if value is not None}
    save(path, arrays, metadata)


@pytest.mark.parametrize("changes", [
    {"config": None}, {"tokenizer": None}, {"kind": None}, {"kind": "Oracle"}, {"config": "small"},
    {"config": {"depth": 3}}, {"config": {"width": 5}}, {"tokenizer": "{}"}], ids=str)
def test_a_checkpoint_without_a_model_is_an_error(saved, changes):
    respell(saved, **changes)
    with pytest.raises(CheckpointError, match="model: holds no model that this minilm can build"):
        load_model(saved)


def test_a_model_file_without_weights_is_an_error(saved):
    _, metadata = load(saved)
    save(saved, {}, metadata)
    with pytest.raises(CheckpointError):
        load_model(saved)


@pytest.mark.parametrize("change, message", [
    ({"layers": 2}, r"missing \(blocks.1"),
    ({"tied": True}, r"unexpected \(unembedding"),
    ({"ffn_width": 5}, "gate_up is")], ids=["layers", "tied", "width"])
def test_weights_that_do_not_fit_the_config_are_an_error(saved, change, message):
    respell(saved, config={**dataclasses.asdict(transformer().config), **change})
    with pytest.raises(CheckpointError, match=f"another architecture: .*{message}"):
        load_model(saved)
