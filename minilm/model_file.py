"""A model in one file: weights, Config and tokenizer together, so that they always match."""

import dataclasses

import numpy as np

from minilm.backend import to_numpy
from minilm.checkpoint import CheckpointError, Path, load, load_into, save
from minilm.model import Config, RewardModel, Transformer
from minilm.tokenizer import Tokenizer


def save_model(path: Path, model: Transformer | RewardModel, tokenizer: Tokenizer, **metadata) -> None:
    """Writes a model with its Config, its tokenizer and more metadata.

    Raises ValueError if tokenizer and model have different vocabularies, and CheckpointError as save does.
    """
    body = getattr(model, "transformer", model)
    if tokenizer.vocab_size != body.config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens and the model {body.config.vocab_size}; "
                         "save the model with the tokenizer that it was trained with")
    save(path, {name: to_numpy(p.data) for name, p in model.parameters().items()},
         {**metadata, "kind": type(model).__name__, "config": dataclasses.asdict(body.config),
          "tokenizer": tokenizer.to_json()})


def load_model(path: Path) -> tuple[Transformer | RewardModel, Tokenizer, dict]:
    """(model, tokenizer, metadata) from a file of save_model. Raises CheckpointError as load does."""
    arrays, metadata = load(path)
    try:
        config = Config(**metadata["config"])
        tokenizer = Tokenizer.from_json(metadata["tokenizer"])
        if metadata["kind"] not in ("Transformer", "RewardModel"):
            raise ValueError(f"kind {metadata['kind']!r}")
        dtype = arrays["embedding"].dtype
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: holds no model that this minilm can build ({error}). Check the "
                              "path.") from error
    model = Transformer(config, np.random.default_rng(0), dtype)
    if metadata["kind"] == "RewardModel":
        model = RewardModel(model, np.random.default_rng(0))
    load_into(model.parameters(), arrays, path)
    return model, tokenizer, metadata
