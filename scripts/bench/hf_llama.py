"""minilm's transformer in Hugging Face's transformers: the same weights, under the names and in the layout there.

transformers has separate, transposed matrices where minilm has one joined matrix. Used by the benchmarks and by the
tests that compare minilm with TRL.
"""

import torch
import transformers

PAD = 0
BLOCK = {"attention_norm": ["input_layernorm"],
         "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
         "attention_out": ["self_attn.o_proj"],
         "ffn_norm": ["post_attention_layernorm"],
         "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
         "ffn_out": ["mlp.down_proj"]}


def layout(model):
    """{minilm's name of a parameter: the parameters of transformers that it joins, in their order}."""
    modules = {"embedding": ["model.embed_tokens"], "final_norm": ["model.norm"],
               "unembedding": ["lm_head"], "reward_head": ["score"]}
    for i in range(model.config.num_hidden_layers):
        modules |= {f"blocks.{i}.{name}": [f"model.layers.{i}.{part}" for part in parts]
                    for name, parts in BLOCK.items()}
    theirs = dict(model.named_parameters())     # no lm_head if tied, and either lm_head or score
    found = {name: [theirs.pop(f"{part}.weight") for part in parts]
             for name, parts in modules.items() if f"{parts[0]}.weight" in theirs}
    assert not theirs, f"parameters that minilm does not have: {list(theirs)}"
    return found


def transpose(name, array):
    """Tables of tokens have a row for each token in both libraries; other matrices are (in, out) and (out, in)."""
    return array if name.endswith("embedding") else array.T


def llama(config, weights, kind=transformers.LlamaForCausalLM, eos=None):
    """The model of transformers. config: a dictionary of the fields of Config; weights: arrays by minilm's names.

    kind LlamaForSequenceClassification gives a reward model.
    """
    c = config
    assert c["causal"] and not c["key_smear"] and c["rope_pairing"] == "half", "no Llama"
    model = kind(transformers.LlamaConfig(
        vocab_size=c["vocab_size"], hidden_size=c["width"], num_hidden_layers=c["layers"],
        num_attention_heads=c["heads"], num_key_value_heads=c["kv_heads"], head_dim=c["head_width"],
        intermediate_size=c["ffn_width"], max_position_embeddings=c["context"], rms_norm_eps=c["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": c["rope_base"]}, tie_word_embeddings=c["tied"],
        num_labels=1, pad_token_id=PAD, bos_token_id=None, eos_token_id=eos))
    load(model, weights)
    return model


def load(model, weights):
    """Put minilm's weights, arrays by name, into a model of transformers."""
    for name, parts in layout(model).items():
        rows = torch.from_numpy(transpose(name, weights[name])).split([len(p) for p in parts])
        for p, of_p in zip(parts, rows, strict=True):
            p.data.copy_(of_p)


def gradients(model):
    """The gradients by minilm's names and in its layout."""
    return {name: transpose(name, torch.cat([p.grad for p in parts]).cpu().numpy())
            for name, parts in layout(model).items()}
