"""A model in one file: weights, Config and tokenizer together, so that they always match."""

import dataclasses

import numpy as np

from minilm import checks
from minilm.backend import to_numpy
from minilm.checkpoint import CheckpointError, Path, load, load_into, one_line, save
from minilm.model import Config, RewardModel, Transformer
from minilm.tokenizer import Tokenizer

RESERVED = ("kind", "config", "tokenizer")      # metadata of save_model itself


def save_model(path: Path, model: Transformer | RewardModel, tokenizer: Tokenizer, **metadata) -> None:
    """Writes a model with its Config, its tokenizer and more metadata.

    Raises ValueError if tokenizer and model have different vocabularies or metadata has one of the names RESERVED, and
    CheckpointError as save does.
    """
    if taken := [name for name in RESERVED if name in metadata]:
        raise ValueError(f"save_model: metadata has '{taken[0]}', which save_model writes itself; give it another name")
    body = model.transformer if isinstance(model, RewardModel) else model
    if tokenizer.vocab_size != body.config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens and the model {body.config.vocab_size}; "
                         "save the model with the tokenizer that it was trained with")
    save(path, {name: to_numpy(p.data) for name, p in model.parameters().items()},
         {**metadata, "kind": type(model).__name__, "config": dataclasses.asdict(body.config),
          "tokenizer": tokenizer.to_json()})


def load_model(path: Path, finite: bool = True) -> tuple[Transformer | RewardModel, Tokenizer, dict]:
    """(model, tokenizer, metadata) from a file of save_model.

    finite: raise for weights that are NaN or infinite, because nothing that such a model computes means anything; False
    loads them, to see where a training diverged.
    Raises CheckpointError as load does, and for a file whose weights, Config and tokenizer do not fit together.
    """
    arrays, metadata = load(path)
    try:
        config = Config(**metadata["config"])
        tokenizer = Tokenizer.from_json(metadata["tokenizer"])
        kind = checks.choice("load_model", "kind", metadata["kind"], ("Transformer", "RewardModel"))
        if tokenizer.vocab_size != config.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size}")
        dtype = arrays["embedding"].dtype
        for name, array in arrays.items():
            if array.dtype not in (np.float32, np.float64):
                raise TypeError(f"{name} is {array.dtype}; weights are float32 or float64")
            if finite:
                checks.finite("load_model", name, array)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: holds no model that this minilm can build ({one_line(error)}). Check the "
                              "path.") from error
    _check_sizes(path, config, arrays)
    model = Transformer(config, np.random.default_rng(0), dtype)
    if kind == "RewardModel":
        model = RewardModel(model, np.random.default_rng(0))
    load_into(model.parameters(), arrays, path)
    return model, tokenizer, metadata


def _check_sizes(path, config, arrays):
    """The sizes in the Config against those of the arrays, before a model of that size is allocated.

    These arrays have every size of the Config; load_into compares all arrays.
    """
    def check(name, *shape):
        saved = arrays[name].shape if name in arrays else None
        if saved != shape:
            fault = f"missing ({name})" if saved is None else f"{name} is {saved} there, {shape} here"
            raise CheckpointError(f"{path}: a checkpoint of another architecture: {fault}. "
                                  "Build the model with the settings it was saved with.")

    check("embedding", config.vocab_size, config.width)
    for i in range(config.layers):
        check(f"blocks.{i}.qkv", config.width, (config.heads + 2 * config.kv_heads) * config.head_width)
        check(f"blocks.{i}.gate_up", config.width, 2 * config.ffn_width)
