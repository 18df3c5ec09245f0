"""A model in one file: weights, Config and tokenizer together, so that nothing can be mismatched."""

import dataclasses

import numpy as np

from minilm.backend import to_numpy
from minilm.checkpoint import CheckpointError, load, load_into, save
from minilm.model import Config, RewardModel, Transformer
from minilm.tokenizer import Tokenizer


def save_model(path, model, tokenizer, **metadata):
    """A Transformer or a RewardModel with its Config and its tokenizer, whole, in one file.

    Raises ValueError if the tokenizer is not the model's (another vocabulary), else what save raises.
    """
    body = getattr(model, "transformer", model)
    if tokenizer.vocab_size != body.config.vocab_size:
        raise ValueError(f"a tokenizer of {tokenizer.vocab_size} tokens for a model of {body.config.vocab_size}")
    save(path, {name: to_numpy(p.data) for name, p in model.parameters().items()},
         {**metadata, "kind": type(model).__name__, "config": dataclasses.asdict(body.config),
          "tokenizer": tokenizer.to_json()})


def load_model(path):
    """(model, tokenizer, metadata) from a file of save_model. Raises CheckpointError as load does."""
    arrays, metadata = load(path)
    try:
        config, tokenizer = Config(**metadata["config"]), Tokenizer.from_json(metadata["tokenizer"])
        if metadata["kind"] not in ("Transformer", "RewardModel"):
            raise ValueError(f"kind {metadata['kind']!r}")
        dtype = arrays["embedding"].dtype
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: holds no model that this minilm can build ({error}). Check the path.") from error
    model = Transformer(config, np.random.default_rng(0), dtype)
    if metadata["kind"] == "RewardModel":
        model = RewardModel(model, np.random.default_rng(0))
    load_into(model.parameters(), arrays, path)
    return model, tokenizer, metadata
