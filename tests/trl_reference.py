"""One step of TRL's own trainers, in float64, with a Llama that has minilm's weights.

The other implementation of test_trl_parity.py. Nothing of TRL is written again here: its trainers tokenise
the text, mask, pad, score, reward, differentiate and log. This file gives them weights and text (and, instead
of sampling, the completions), and reads their results. It adapts three things:

weights   transformers stores separately, and transposed, the matrices that minilm joins: `hf_llama`
float64   both libraries convert to float32 by name in places, and get float64 instead: `Float64`
silence   nothing is fetched, reported or saved: `make`

To compare a loss of your own with TRL's:

    with float64():
        trainer = dpo_trainer(folder, config, policy, reference, prompts, chosen, rejected, loss_type="sigmoid")
        loss_and_gradients, logged = step(trainer, batch(trainer))
"""

import contextlib
import dataclasses
from unittest import mock

import datasets
import tokenizers
import torch
import transformers
import trl
from torch.overrides import TorchFunctionMode
from trl.kernels import ChunkedLogProbFunction

import hf_llama

PAD, EOS = hf_llama.PAD, 1         # different: TRL's reward model finds the padding by its token id


# float64.

class Float64(TorchFunctionMode):
    """The same code with wider numbers: every conversion to float32 gives float64.

    transformers converts in RMSNorm and for the rotary angles, TRL for the log-probs, their gradient and the
    rewards; in float32, parity could only be tested to 1e-6.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def wider(x):
            return torch.float64 if x is torch.float32 else x

        function = torch.Tensor.double if function is torch.Tensor.float else function
        return function(*map(wider, args), **{name: wider(x) for name, x in (kwargs or {}).items()})


@contextlib.contextmanager
def float64():
    """float64 throughout, on one thread, which is faster for such small arrays."""
    def backward(*args, by_trl=ChunkedLogProbFunction.backward):
        with Float64():         # autograd calls backward outside the mode
            return by_trl(*args)

    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    try:
        with Float64(), mock.patch.object(ChunkedLogProbFunction, "backward", staticmethod(backward)):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)


# Weights.

def llama(config, weights, kind=transformers.LlamaForCausalLM):
    """minilm's Transformer (or, with kind LlamaForSequenceClassification, RewardModel) in transformers."""
    return hf_llama.llama(dataclasses.asdict(config), weights, kind, EOS)


# Text.

def tokenizer(vocab_size):
    """One token for each word: after padding and EOS, the words are the numbers themselves."""
    words = ["<pad>", "<eos>", *map(str, range(2, vocab_size))]
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def text(tokens):
    """The text of these tokens, without a last EOS: the SFT, reward and DPO trainers add it themselves."""
    return "".join(f"{token} " for token in (tokens[:-1] if tokens[-1] == EOS else tokens))


# Trainers. Weights are arrays by minilm's name, prompts and responses are token lists, options are those of TRL's
# Config.

def make(name, folder, config, *models, rows, options, **others):
    """The trainer with this name. (bf16 is TRL's default, and RLOO and GRPO would autocast to it.)"""
    arguments = getattr(trl, f"{name}Config")(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, **options)
    return getattr(trl, f"{name}Trainer")(
        *models, args=arguments, processing_class=tokenizer(config.vocab_size),
        train_dataset=datasets.Dataset.from_dict(rows), **others)


def sft_trainer(folder, config, weights, prompts, responses, **options):
    rows = {"prompt": [text(p) for p in prompts], "completion": [text(r) for r in responses]}
    return make("SFT", folder, config, llama(config, weights), rows=rows, options=options)


def preferences(prompts, chosen, rejected):
    return {"prompt": [text(p) for p in prompts], "chosen": [text(c) for c in chosen],
            "rejected": [text(r) for r in rejected]}


def reward_trainer(folder, config, weights, prompts, chosen, rejected, margin=None, **options):
    rows = preferences(prompts, chosen, rejected) | ({} if margin is None else {"margin": margin})
    model = llama(config, weights, transformers.LlamaForSequenceClassification)
    return make("Reward", folder, config, model, rows=rows, options=options)


def dpo_trainer(folder, config, policy, reference, prompts, chosen, rejected, **options):
    return make("DPO", folder, config, llama(config, policy), llama(config, reference),
                rows=preferences(prompts, chosen, rejected), options=options)


def online_trainer(name, folder, config, policy, reference, rewards, **options):
    """The trainer named "RLOO" or "GRPO"; rewards (P,K), of P prompts in order with K completions each."""
    P, K = rewards.shape
    model = llama(config, policy)
    # TRL loads the reference itself, from the path in the policy's config.
    llama(config, reference).save_pretrained(folder / "reference")
    model.config._name_or_path = str(folder / "reference")
    return make(name, folder, config, model, rows={"prompt": ["2"]},
                options={"num_generations": K, "per_device_train_batch_size": P * K, **options},
                reward_funcs=lambda completions, **_: rewards.flatten().tolist())


def rollout(trainer, prompts, completions):
    """A batch with advantages, from given completions (K in a row for each prompt) instead of samples.

    Only the sampling is replaced; TRL scores and rewards the completions, and computes the advantages.
    """
    K = trainer.num_generations
    trainer._generate_single_turn = lambda *_, **__: (
        completions if isinstance(trainer, trl.RLOOTrainer) else (completions, None))
    trainer.model.train()
    return trainer._generate_and_score_completions([{"prompt": text(prompt)} for prompt in prompts for _ in range(K)])


# One step.

def batch(trainer, rows=None):
    """Rows of the trainer's dataset (None: all), tokenised and padded by TRL."""
    rows = range(len(trainer.train_dataset)) if rows is None else rows
    return trainer.data_collator([trainer.train_dataset[i] for i in rows])


def step(trainer, *batches):
    """The loss with every gradient, and the metrics that TRL logs: its training loop without the optimiser.

    Several batches are the microbatches of one accumulation window.
    """
    model = trainer.model.train()
    model.zero_grad()
    batches, num_items = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = len(batches)
    loss = sum(trainer.compute_loss(model, batch, num_items_in_batch=num_items) for batch in batches)
    loss.backward()
    trainer.log({"loss": loss.item()})
    return {"loss": loss.detach().numpy(), **hf_llama.gradients(model)}, trainer.state.log_history[-1]
