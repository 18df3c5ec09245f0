"""minilm/pretrained/adapter_folder.py: adapters are read as they were saved, PEFT opens them, others are errors."""
import json

import numpy as np
import pytest

from helpers import small_transformer
from minilm.checkpoint import CheckpointError
from minilm.lora import TARGETS, Adapted
from minilm.pretrained import save
from minilm.pretrained.adapter_folder import load_adapters, save_adapters
from test_pretrained import CHAT, SHAPES, TOKENS, model_of

safetensors = pytest.importorskip("safetensors.numpy", reason="needs safetensors: pip install safetensors")
BASE = model_of(SHAPES["as SmolLM2"])
some_targets = pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "v_proj"), ("down_proj",)], ids=" ".join)


def adapted(targets=TARGETS):
    rng = np.random.default_rng(1)
    model = Adapted(BASE, 3, 8.0, rng, targets)
    for p in model.parameters().values():
        p.data[...] = rng.normal(size=p.shape) * 0.3
    return model


@pytest.fixture
def folder(tmp_path):
    save_adapters(adapted(), tmp_path / "adapter", "a/base")
    return tmp_path / "adapter"


@some_targets
def test_adapters_are_read_as_they_were_saved(tmp_path, targets):
    model = adapted(targets)
    save_adapters(model, tmp_path)
    loaded = load_adapters(BASE, tmp_path)
    assert (loaded.rank, loaded.alpha, loaded.targets) == (3, 8.0, model.targets)
    assert list(loaded.parameters()) == list(model.parameters())
    assert all((p.data == model.parameters()[name].data).all() and p.requires_grad
               for name, p in loaded.parameters().items())
    assert (loaded(TOKENS).data == model(TOKENS).data).all()


@pytest.mark.parity
@some_targets
def test_peft_opens_what_we_save_and_we_open_what_peft_saves(tmp_path, targets):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install torch==2.13.0")
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install trl==1.16.0")
    save(BASE, CHAT, tmp_path / "base")
    model = adapted(targets)
    save_adapters(model, tmp_path / "ours", str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), tmp_path / "ours")
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    assert abs(model(TOKENS).data - expected).max() < 1e-4 * abs(expected).max()
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapters(BASE, tmp_path / "theirs")
    assert (again(TOKENS).data == model(TOKENS).data).all()
    merged = theirs.merge_and_unload().state_dict()["model.layers.0.mlp.down_proj.weight"].numpy()
    np.testing.assert_allclose(model.merged().parameters()["blocks.0.ffn_out"].data.T, merged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes, message", [
    ({"use_rslora": True}, "has use_rslora True"), ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias 'all'"),
    ({"peft_type": "IA3"}, "has peft_type 'IA3'"), ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
    ({"r": 0}, "r is 0, and the tensors have other ranks"), ({"r": []}, "cannot be used"),
    ({"lora_alpha": None}, "alpha"), ({"target_modules": "all-linear"}, "targets is 'all-linear'"),
    ({"target_modules": ["lm_head"]}, "Matrices that can be adapted are q_proj"), ({"target_modules": 3}, "cannot be"),
    ({"r": 4}, "r is 4"), ({"target_modules": ["q_proj"]}, "is unknown: adapters of another model")], ids=str)
def test_a_setting_that_minilm_lacks_or_that_does_not_fit_is_an_error(folder, changes, message):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(CheckpointError, match=message) as found:
        load_adapters(BASE, folder)
    assert "\n" not in str(found.value)


def test_adapters_of_a_deeper_model_and_missing_files_are_errors(folder):
    deeper = small_transformer(np.random.default_rng(0), np.float32, **{**SHAPES["as SmolLM2"], "layers": 3})
    with pytest.raises(CheckpointError, match="layers.2.* is missing: adapters of another model"):
        load_adapters(deeper, folder)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=f"{name}: cannot be read"):
            load_adapters(BASE, folder)
