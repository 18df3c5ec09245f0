"""TRL's own trainers, one step of them, in float64, over a Llama with minilm's weights.

The other side of test_trl_parity.py, and nothing of TRL is written a second time here: its trainers
tokenise the text, mask, pad, score, reward and differentiate, and log. We give them weights and text
(and, instead of sampling, the completions), and read what they computed. Three things stand between:

weights   transformers keeps apart, and transposed, the matrices that minilm joins: `hf_llama`
float64   both libraries ask for float32 by name in places, and are given float64: `Float64`
silence   nothing is fetched, reported or saved: `make`

To hold a loss of your own against TRL's:

    with float64():
        trainer = dpo_trainer(folder, config, policy, reference, prompts, chosen, rejected, loss_type="sigmoid")
        loss_and_gradients, logged = step(trainer, batch(trainer))
"""

import contextlib
import dataclasses
from unittest import mock

import datasets
import hf_llama
import tokenizers
import torch
import transformers
import trl
from torch.overrides import TorchFunctionMode
from trl.kernels import ChunkedLogProbFunction

PAD, EOS = hf_llama.PAD, 1         # two tokens: TRL's reward model reads the score before the padding, by the token's id


# float64.

class Float64(TorchFunctionMode):
    """The same code on wider numbers: whoever asks for float32 gets float64.

    transformers asks for it in RMSNorm and for the rotary angles, TRL for the log-probs, their
    gradient and the rewards; in float32 parity would end at 1e-6.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def wider(x):
            return torch.float64 if x is torch.float32 else x

        function = torch.Tensor.double if function is torch.Tensor.float else function
        return function(*map(wider, args), **{name: wider(x) for name, x in (kwargs or {}).items()})


@contextlib.contextmanager
def float64():
    """float64 throughout, on one thread, which is enough for such small arrays, and faster."""
    def backward(*args, by_trl=ChunkedLogProbFunction.backward):
        with Float64():         # autograd works outside of any mode
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
    """One token a word: the numbers themselves, after padding and EOS."""
    words = ["<pad>", "<eos>", *map(str, range(2, vocab_size))]
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def text(tokens):
    """What the tokenizer reads as these tokens, less a last EOS: SFT, reward and DPO trainers add that themselves."""
    return "".join(f"{token} " for token in (tokens[:-1] if tokens[-1] == EOS else tokens))


# Trainers. Weights are arrays by minilm's name; prompts and responses token lists; options those of TRL's Config.

def make(name, folder, config, *models, rows, options, **others):
    """The trainer of that name. (bf16 is TRL's default, and RLOO and GRPO would autocast to it.)"""
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
    """Of name "RLOO" or "GRPO"; rewards (P,K), of P prompts in order, K completions each."""
    P, K = rewards.shape
    model = llama(config, policy)
    # TRL loads the reference itself, from where the policy says that it came from.
    llama(config, reference).save_pretrained(folder / "reference")
    model.config._name_or_path = str(folder / "reference")
    return make(name, folder, config, model, rows={"prompt": ["2"]},
                options={"num_generations": K, "per_device_train_batch_size": P * K, **options},
                reward_funcs=lambda completions, **_: rewards.flatten().tolist())


def rollout(trainer, prompts, completions):
    """A batch, with advantages, of completions (K in a row for each prompt) that the model might have sampled.

    Only the sampling is replaced; TRL scores, rewards and compares them.
    """
    K = trainer.num_generations
    trainer._generate_single_turn = lambda *_, **__: (
        completions if isinstance(trainer, trl.RLOOTrainer) else (completions, None))
    trainer.model.train()
    return trainer._generate_and_score_completions([{"prompt": text(prompt)} for prompt in prompts for _ in range(K)])


# One step.

def batch(trainer, rows=None):
    """Rows of the trainer's dataset (None: all), as it tokenised them and as its collator pads them."""
    rows = range(len(trainer.train_dataset)) if rows is None else rows
    return trainer.data_collator([trainer.train_dataset[i] for i in rows])


def step(trainer, *batches):
    """The loss, with every gradient, and what TRL logs: its training loop without the optimiser.

    Several batches are the micro-batches of one accumulation window.
    """
    model = trainer.model.train()
    model.zero_grad()
    batches, num_items = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = len(batches)
    loss = sum(trainer.compute_loss(model, batch, num_items_in_batch=num_items) for batch in batches)
    loss.backward()
    trainer.log({"loss": loss.item()})
    return {"loss": loss.detach().numpy(), **hf_llama.gradients(model)}, trainer.state.log_history[-1]
