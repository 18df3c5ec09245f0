"""minilm/pretrained: a Llama checkpoint has the logits of transformers; other models and damaged files are errors."""
import json
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, strategies as st

from gguf_writer import float32, gguf
from helpers import small_transformer
from minilm.checkpoint import CheckpointError
from minilm.generate import generate
from minilm.model import RewardModel, Transformer
from minilm.pretrained import load, save
from minilm.pretrained.chat_tokenizer import CHATML, ChatTokenizer
from minilm.pretrained.llama_names import gguf_names, hugging_face_names, split
from minilm.pretrained.safetensors_folder import SafetensorsFolder
from minilm.stages.sft import train_sft
from minilm.stages.train_state import TrainState
from test_byte_level import TOKENIZER
from test_chat_tokenizer import SMOLLM2

safetensors = pytest.importorskip("safetensors.numpy", reason="needs safetensors: pip install safetensors")

V = TOKENIZER.vocab_size
CHAT = ChatTokenizer(TOKENIZER, SMOLLM2, {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"})
SHAPES = {"as SmolLM2": {"heads": 9, "kv_heads": 3, "width": 36, "head_width": 4, "ffn_width": 20, "layers": 2,
                         "vocab_size": V, "tied": True, "rope_base": 1e5, "norm_eps": 1e-5, "context": 64},
          "untied, padded vocabulary": {"heads": 4, "kv_heads": 2, "width": 12, "head_width": 6, "ffn_width": 7,
                                        "layers": 1, "vocab_size": V + 5, "rope_base": 1e4, "norm_eps": 1e-6,
                                        "context": 64}}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
MESSAGES = [{"role": "user", "content": "Hi 12"}]


def model_of(shape):
    return small_transformer(np.random.default_rng(0), np.float32, **shape)


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def saved(request, tmp_path):
    """A model, and the folder that save wrote."""
    model = model_of(request.param)
    save(model, CHAT, tmp_path / "model")
    return model, tmp_path / "model"


def same_weights(model, other):
    here, there = model.parameters(), other.parameters()
    return list(here) == list(there) and all((here[name].data == there[name].data).all() for name in here)


def as_gguf(model, change=lambda metadata, tensors: None):
    """The bytes of a GGUF file of a model with CHAT's tokenizer: the rows of query and key for interleaved pairs."""
    c, tensors = model.config, {}
    for name, parts in gguf_names(c).items():
        weight = model.parameters()[name].data
        if name.endswith(("norm", "embedding")):
            tensors[parts[0]] = float32(weight)
            continue
        for part, matrix in zip(parts, split(c, name, weight)):
            rows = matrix.T
            if ".attn_q." in part or ".attn_k." in part:
                rows = rows.reshape(-1, 2, c.head_width // 2, c.width).swapaxes(1, 2).reshape(rows.shape)
            tensors[part] = float32(rows)
    joined = [f"{TOKENIZER.names[a]} {TOKENIZER.names[b]}" for a, b in TOKENIZER.merges]
    metadata = {"general.architecture": "llama", "llama.block_count": c.layers, "llama.context_length": c.context,
                "llama.embedding_length": c.width, "llama.feed_forward_length": c.ffn_width,
                "llama.attention.head_count": c.heads, "llama.attention.head_count_kv": c.kv_heads,
                "llama.attention.key_length": c.head_width, "llama.rope.dimension_count": c.head_width,
                "llama.rope.freq_base": float(c.rope_base), "llama.attention.layer_norm_rms_epsilon": c.norm_eps,
                "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
                "tokenizer.ggml.tokens": TOKENIZER.names, "tokenizer.ggml.merges": joined,
                "tokenizer.ggml.token_type": [3 if name in TOKENIZER.specials else 1 for name in TOKENIZER.names],
                "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1, "tokenizer.chat_template": SMOLLM2}
    change(metadata, tensors)
    return gguf(metadata, tensors)


def test_a_saved_folder_is_loaded_bit_for_bit_with_its_config_and_tokenizer(saved):
    model, folder = saved
    loaded, tokenizer = load(folder)
    assert loaded.config == model.config and same_weights(loaded, model)
    assert tokenizer.encode_chat(MESSAGES) == CHAT.encode_chat(MESSAGES)
    assert (tokenizer.ends, tokenizer.bos, tokenizer.template) == (CHAT.ends, CHAT.bos, CHAT.template)


def test_metadata_without_effect_are_accepted_and_a_second_end_token_ends(tmp_path):
    def change(metadata, tensors):
        metadata.update({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1.0,
                         "llama.attention.causal": True, "llama.vocab_size": 5, "general.name": "x",
                         "llama.expert_count": 0, "tokenizer.ggml.eot_token_id": 4})
    (tmp_path / "f.gguf").write_bytes(as_gguf(model_of(SHAPES["as SmolLM2"]), change))
    assert load(tmp_path / "f.gguf")[1].ends == (0, 1, 4)


@shapes
def test_a_gguf_file_is_the_same_model(tmp_path, shape):
    model = model_of(shape)
    (tmp_path / "model.gguf").write_bytes(as_gguf(model))
    loaded, tokenizer = load(tmp_path / "model.gguf")
    assert loaded.config == model.config and same_weights(loaded, model)
    assert tokenizer.encode_chat(MESSAGES) == CHAT.encode_chat(MESSAGES) and tokenizer.ends == CHAT.ends


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_numbers_of_16_bits_are_read_exactly(saved, dtype):
    model, folder = saved
    tensors = safetensors.load_file(folder / "model.safetensors")
    if dtype == "float16":
        rounded = {name: x.astype(np.float16) for name, x in tensors.items()}
        safetensors.save_file(rounded, folder / "model.safetensors")
    else:
        rounded = {name: (x.view(np.uint32) >> 16 << 16).view(np.float32) for name, x in tensors.items()}
        header, data = {}, b""
        for name, x in rounded.items():
            raw = (x.view(np.uint32) >> 16).astype("<u2").tobytes()
            header[name] = {"dtype": "BF16", "shape": x.shape, "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    loaded, _ = load(folder)
    assert loaded.dtype == np.float32
    q = hugging_face_names(model.config)["blocks.0.qkv"][0]
    assert (next(split(model.config, "blocks.0.qkv", loaded.parameters()["blocks.0.qkv"].data)).T == rounded[q]).all()


def test_each_matrix_of_a_folder_is_a_part_of_a_weight_and_stands_as_output_by_input(saved):
    model, folder = saved
    c = model.config
    K, G = c.head_width, c.kv_heads
    tensors = safetensors.load_file(folder / "model.safetensors")
    weight = {name: p.data for name, p in model.parameters().items()}
    q, k, v = (tensors[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv")
    assert (q.shape, k.shape, v.shape) == ((c.heads * K, c.width), (G * K, c.width), (G * K, c.width))
    assert (np.concatenate([q, k, v]).T == weight["blocks.0.qkv"]).all()
    gate, up = (tensors[f"model.layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    assert (np.concatenate([gate, up]).T == weight["blocks.0.gate_up"]).all()
    assert (tensors["model.layers.0.mlp.down_proj.weight"].T == weight["blocks.0.ffn_out"]).all()


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_norm.weight"])
def test_a_tensor_that_minilm_would_ignore_is_an_error(saved, name):
    _, folder = saved
    tensors = safetensors.load_file(folder / "model.safetensors")
    safetensors.save_file({**tensors, name: np.zeros(3, np.float32)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"the tensor {name} is unknown"):
        load(folder)


def test_a_template_in_a_file_of_its_own_comes_before_the_one_in_the_configuration(saved):
    _, folder = saved
    (folder / "chat_template.jinja").write_text(CHATML)
    assert load(folder)[1].template == CHATML


def test_several_files_with_an_index_are_one_model(saved):
    model, folder = saved
    tensors = safetensors.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = [sorted(tensors)[::2], sorted(tensors)[1::2]]
    for i, names in enumerate(halves):
        safetensors.save_file({name: tensors[name] for name in names}, folder / f"part-{i}.safetensors")
    index = {"weight_map": {name: f"part-{i}.safetensors" for i, names in enumerate(halves) for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same_weights(load(folder)[0], model)
    index["weight_map"][sorted(tensors)[0]] = "../part-0.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside the folder"):
        load(folder)


def test_a_file_that_becomes_shorter_after_it_was_opened_is_an_error(saved):
    _, folder = saved
    tensors = SafetensorsFolder(folder)
    file = folder / "model.safetensors"
    last = max(tensors.places, key=lambda name: tensors.places[name][3])
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=f"ends within {last}"):
        tensors.array(last)


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "gemma3"}, "model_type is 'gemma3', and minilm loads 'llama'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "has rope_scaling .*llama3"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "has rope_type 'yarn'"),
    ({"rope_parameters": {"type": "linear", "rope_theta": 1e4}}, "has rope_type 'linear'"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "has partial_rotary_factor 0.5"),
    ({"rope_interleaved": True}, "rope_interleaved"), ({"residual_multiplier": 0.2}, "residual_multiplier"),
    ({"logits_scaling": 8}, "logits_scaling"), ({"embedding_multiplier": 12}, "embedding_multiplier"),
    ({"attention_bias": True}, "has attention_bias True"), ({"mlp_bias": True}, "has mlp_bias True"),
    ({"hidden_act": "gelu"}, "has hidden_act 'gelu'"), ({"sliding_window": 4096}, "has sliding_window 4096"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": "many"}, "width"), ({"hidden_size": 8, "head_dim": None}, "configuration says|width 8 is not"),
    ({"num_hidden_layers": 3}, r"the tensor model.layers.\d.* is missing"),
    ({"intermediate_size": 9}, "the configuration says"), ({"vocab_size": 9}, "the tokenizer has ids up to"),
    ({"rms_norm_eps": float("nan")}, "norm_eps")], ids=str)
def test_a_setting_that_minilm_lacks_or_that_does_not_fit_is_an_error_with_its_name(saved, changes, message):
    _, folder = saved
    change_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message) as found:
        load(folder)
    assert "\n" not in str(found.value)


def test_the_settings_of_newer_files_and_unknown_ones_without_effect_are_accepted(saved):
    model, folder = saved
    rope = {"rope_type": "default", "rope_theta": model.config.rope_base}
    change_config(folder, rope_theta=None, rope_parameters=rope, rope_scaling=None,
                  pretraining_tp=1, use_cache=True, transformers_version="9")
    assert load(folder)[0].config == model.config


@pytest.mark.parametrize("change, message", [
    (lambda m, t: m.update({"general.architecture": "gemma3"}), "architecture is 'gemma3'"),
    (lambda m, t: m.update({"llama.rope.scaling.type": "yarn"}), "has llama.rope.scaling.type"),
    (lambda m, t: m.update({"llama.expert_count": 8}), "has llama.expert_count"),
    (lambda m, t: m.update({"llama.rope.scale_linear": 4.0}), "has llama.rope.scale_linear 4.0"),
    (lambda m, t: m.update({"llama.attention.causal": False}), "has llama.attention.causal False"),
    (lambda m, t: m.update({"llama.final_logit_softcapping": 30.0}), "has llama.final_logit_softcapping"),
    (lambda m, t: m.update({"llama.attention.value_length": 2}), "llama.attention.value_length is 2"),
    (lambda m, t: m.update({"llama.block_count": 4000000000}), "says 4000000000 layers"),
    (lambda m, t: m.update({"tokenizer.chat_template": 5}), "the chat template is a int"),
    (lambda m, t: m["tokenizer.ggml.token_type"].__setitem__(9, 4), "has added tokens such as"),
    (lambda m, t: m.update({"tokenizer.ggml.eot_token_id": 99999}), r"end tokens \[99999\] are no tokens"),
    (lambda m, t: t.update({"rope_freqs.weight": float32(np.ones(2))}), "rope_freqs.weight is unknown"),
    (lambda m, t: t.update({"blk.0.attn_q.bias": float32(np.ones(2))}), "blk.0.attn_q.bias is unknown"),
    (lambda m, t: t.pop("output_norm.weight"), "output_norm.weight is missing"),
    (lambda m, t: t.update({"blk.0.ffn_up.weight": float32(np.ones((3, 3)))}), "blk.0.ffn_up.weight has shape"),
    (lambda m, t: t.update({"output_norm.weight": float32(np.ones(3))}), r"output_norm.weight has shape \(3,\)"),
    (lambda m, t: t.update({"output_norm.weight": float32(np.full(t["output_norm.weight"][0], np.nan))}), "final_norm"),
    (lambda m, t: m.pop("llama.block_count"), "'llama.block_count' is missing"),
    (lambda m, t: m.update({"llama.rope.dimension_count": 2}), "llama.rope.dimension_count is 2"),
    (lambda m, t: m.update({"tokenizer.ggml.pre": "llama-bpe"}), "tokenizer is 'gpt2', 'llama-bpe'"),
    (lambda m, t: m.update({"tokenizer.ggml.eos_token_id": 99999}), "no model that minilm can build"),
    (lambda m, t: m.update({"tokenizer.ggml.merges": ["ab"]}), "no model that minilm can build"),
    (lambda m, t: m.update({"tokenizer.ggml.token_type": 5}), "no model that minilm can build")])
def test_a_gguf_file_of_another_model_is_an_error_with_the_fault(tmp_path, change, message):
    (tmp_path / "f.gguf").write_bytes(as_gguf(model_of(SHAPES["as SmolLM2"]), change))
    with pytest.raises(CheckpointError, match=message) as found:
        load(tmp_path / "f.gguf")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@given(data=st.data())
def test_a_missing_or_damaged_file_is_one_line(name, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save(model_of(SHAPES["as SmolLM2"]), CHAT, folder)
    raw = (folder / name).read_bytes()
    place = data.draw(st.integers(0, min(len(raw) - 1, 400)))
    damaged = data.draw(st.sampled_from([None, b"", raw[:place], raw[:place] + b"\xff\xff" + raw[place + 2:],
                                         b"[]", b'{"a": 1}', b"[" * 100_000, raw.replace(b":", b",", 1)]))
    (folder / name).unlink()
    if damaged is not None:
        (folder / name).write_bytes(damaged)
    try:
        load(folder)
    except CheckpointError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000


FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
         "model.safetensors.index.json"]


@given(name=st.sampled_from(FILES), data=st.data(),
       value=st.sampled_from([None, 5, -1, 1.5, 10 ** 30, "x", [], {}, ["a"], {"a": []}]))
def test_a_value_of_another_type_anywhere_in_a_file_of_json_is_one_line_or_harmless(name, value, data,
                                                                                     tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save(model_of(SHAPES["as SmolLM2"]), CHAT, folder)
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    names = safetensors.load_file(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names,
                                                                                                  "part.safetensors")}))
    found = json.loads((folder / name).read_text())
    inner = data.draw(st.sampled_from([found, *(x for x in found.values() if isinstance(x, dict))]))
    if inner:
        inner[data.draw(st.sampled_from(sorted(inner)))] = value
    (folder / name).write_text(json.dumps(found))
    try:
        _, tokenizer = load(folder)
        tokenizer.encode_chat(MESSAGES)
    except CheckpointError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    except ValueError as error:         # of a template
        assert "template" in str(error)
    except ImportError as error:        # a template that is not ChatML, where jinja2 is not installed
        assert "pip install jinja2" in str(error) and find_spec("jinja2") is None


@pytest.mark.parametrize("change, message", [
    (lambda f: change_config(f, num_hidden_layers=10 ** 9), "says 1000000000 layers, and there are"),
    (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"), "utf-8"),
    (lambda f: change_config(f, eos_token_id=[1, 9999]), "eos_token_id 9999 is no token"),
    (lambda f: change_config(f, rope_parameters="default"), "rope_parameters is 'default'")])
def test_other_damage_is_one_line(saved, change, message):
    _, folder = saved
    change(folder)
    with pytest.raises(CheckpointError, match=message) as found:
        load(folder)
    assert "\n" not in str(found.value)


def test_all_end_tokens_of_a_folder_end_an_answer(saved):
    _, folder = saved
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 5]}))
    change_config(folder, eos_token_id=7)
    assert load(folder)[1].ends == (0, 1, 4, 5, 7)


def test_of_several_templates_the_default_one_is_taken_and_names_may_be_objects(saved):
    _, folder = saved
    own = json.loads((folder / "tokenizer_config.json").read_text())
    own["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    own["eos_token"] = {"content": own["eos_token"], "lstrip": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    tokenizer = load(folder)[1]
    assert tokenizer.template == CHATML and tokenizer.eos == CHAT.eos
    del own["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    with pytest.raises(ValueError, match="has no chat template"):       # <|im_start|> is no token of this one
        load(folder)[1].encode_chat(MESSAGES)


def test_saving_over_another_model_leaves_nothing_of_it(tmp_path):
    first, second = model_of(SHAPES["as SmolLM2"]), model_of(SHAPES["untied, padded vocabulary"])
    save(first, CHAT, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    names = safetensors.load_file(tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(
        names, "part.safetensors")}))
    (tmp_path / "chat_template.jinja").write_text("old")
    assert same_weights(load(tmp_path)[0], first)
    save(second, CHAT, tmp_path)
    loaded, tokenizer = load(tmp_path)
    assert same_weights(loaded, second) and tokenizer.template == CHAT.template


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "within"):
        with pytest.raises(CheckpointError, match="no folder that can be written"):
            save(model_of(SHAPES["as SmolLM2"]), CHAT, path)


def test_a_tied_model_with_another_output_matrix_and_a_tensor_in_two_files_are_errors(tmp_path):
    model = model_of(SHAPES["as SmolLM2"])
    save(model, CHAT, tmp_path)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    safetensors.save_file({**tensors, **buffer, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()},
                          tmp_path / "model.safetensors")
    assert same_weights(load(tmp_path)[0], model)
    safetensors.save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1},
                          tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for part in "ab":
        safetensors.save_file(tensors, tmp_path / f"{part}.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="as another file does"):
        load(tmp_path)


def test_a_reward_model_is_a_classifier_with_one_number(saved, tmp_path):
    model, _ = saved
    reward = RewardModel(model, np.random.default_rng(3))
    save(reward, CHAT, tmp_path / "reward")
    loaded, _ = load(tmp_path / "reward")
    tokens = np.array([[1, 2, 3], [4, 5, 6]])
    assert type(loaded) is RewardModel
    assert (loaded.rewards(tokens, tokens > 0).data == reward.rewards(tokens, tokens > 0).data).all()


@pytest.mark.parametrize("change, name", [({"key_smear": True}, "key_smear"), ({"causal": False}, "causal"),
                                          ({"rope_pairing": "interleaved"}, "rope_pairing")])
def test_a_model_that_is_no_llama_is_not_saved(tmp_path, change, name):
    with pytest.raises(ValueError, match=f"no Llama has {name}"):
        save(small_transformer(np.random.default_rng(0), np.float32, **change), CHAT, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_transformer_is_made_of_given_weights_which_it_keeps():
    model = model_of(SHAPES["as SmolLM2"])
    weights = {name: p.data for name, p in model.parameters().items()}
    other = Transformer.of(model.config, dict(reversed(weights.items())))
    assert list(other.parameters()) == list(weights)
    assert all(p.data is weights[name] and p.requires_grad for name, p in other.parameters().items())
    with pytest.raises(ValueError, match="'final_norm' is missing; this Config has"):
        Transformer.of(model.config, {name: x for name, x in weights.items() if name != "final_norm"})
    with pytest.raises(ValueError, match=r"'final_norm' is \(3,\); this Config has \(36,\)"):
        Transformer.of(model.config, {**weights, "final_norm": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=r"'bias' is \(3,\); this Config has none of this name"):
        Transformer.of(model.config, {**weights, "bias": np.zeros(3, np.float32)})
    with pytest.raises(TypeError, match="all be float32"):
        Transformer.of(model.config, {**weights, "final_norm": weights["final_norm"].astype(float)})


def test_a_loaded_model_samples_and_trains_on_the_emulated_device_as_on_the_cpu(tmp_path, emulated):
    shape = {"heads": 3, "kv_heads": 1, "width": 24, "head_width": 16, "ffn_width": 8, "layers": 1, "vocab_size": V,
             "tied": True, "rope_base": 1e5, "norm_eps": 1e-5, "context": 64}
    save(model_of(shape), CHAT, tmp_path)
    prompt = CHAT.encode_chat(MESSAGES)[-12:]
    results = []
    for device in ("cpu", "gpu"):
        model = load(tmp_path)[0].to_device(device)
        tokens = generate(model, [prompt, prompt[3:]], 4, np.random.default_rng(0), [1], temperature=0).tokens
        state = TrainState(model, np.random.default_rng(0))
        losses = [m["loss"] for m in train_sft(state, [prompt, prompt[3:]], [[5, 6, 1], [7, 1]], 2, 2)]
        results.append((tokens.tolist(), losses))
    assert results[0][0] == results[1][0]
    np.testing.assert_allclose(results[1][1], results[0][1], rtol=1e-4)


# Against transformers.

@pytest.fixture
def transformers():
    pytest.importorskip("torch", reason="needs PyTorch: pip install torch==2.13.0")
    return pytest.importorskip("transformers", reason="needs transformers, which trl brings: pip install trl==1.16.0")


TOKENS = np.random.default_rng(5).integers(V, size=(2, 23))


@pytest.mark.parity
def test_a_saved_folder_is_opened_by_transformers_with_the_same_logits_and_ids(saved, transformers):
    import torch
    model, folder = saved
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs.double()(torch.tensor(TOKENS)).logits.numpy()
    assert abs(model(TOKENS).data - expected).max() < 1e-4 * abs(expected).max()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    talk = [*MESSAGES, {"role": "assistant", "content": "한국"}, {"role": "user", "content": " a\n\nb 1½"}]
    ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    assert ids == CHAT.encode_chat(talk)
    assert tokenizer.eos_token_id == CHAT.eos


@pytest.mark.parity
@shapes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_of_transformers_has_its_logits_and_greedy_tokens(tmp_path, transformers, shape, dtype):
    import torch
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=shape["vocab_size"], hidden_size=shape["width"], intermediate_size=shape["ffn_width"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], head_dim=shape["head_width"],
        num_key_value_heads=shape["kv_heads"], max_position_embeddings=64, rms_norm_eps=shape["norm_eps"],
        tie_word_embeddings=shape.get("tied", False), rope_theta=shape["rope_base"], initializer_range=0.5,
        rope_parameters={"rope_type": "default", "rope_theta": shape["rope_base"]})
    transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(tmp_path, max_shard_size="5KB")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    save(model_of(SHAPES["as SmolLM2"]), CHAT, tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tmp_path / "other" / name).read_bytes())
    model, _ = load(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with torch.no_grad():
        expected = theirs.double()(torch.tensor(TOKENS)).logits.numpy()
    assert abs(model(TOKENS).data - expected).max() < 1e-4 * abs(expected).max()
    with torch.no_grad():
        prompt = torch.tensor(TOKENS[:1])
        continued = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False,
                                    eos_token_id=None, pad_token_id=0).numpy()[0, TOKENS.shape[1]:]
    ours = generate(model, TOKENS[:1], 8, np.random.default_rng(0), None, temperature=0)
    assert ours.responses()[0] == continued.tolist()
