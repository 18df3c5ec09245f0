"""TRL's trainers with minilm's weights and tokens, and one optimiser step of each: for objectives.py and align.py.

TRL tokenises, masks, pads, samples, scores and differentiates; only the loop around that, `step`, is written again.
With `adapters`, (alpha, arrays by minilm's names), it trains these by PEFT, and the model under them is the reference.
Without gradient checkpointing (TRL is faster without it), on the CPU in float32 unless use_cpu and bf16 are given; all
other settings are TRL's defaults.
Nothing is downloaded, reported or saved.
"""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}      # before the imports that read them

import warnings  # noqa: E402
from tempfile import TemporaryDirectory  # noqa: E402
from unittest import mock  # noqa: E402

import datasets  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from accelerate.utils import is_peft_model  # noqa: E402

from hf_llama import PAD, gradients, llama  # noqa: E402
from minilm.pretrained.adapter_folder import peft_name  # noqa: E402

datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning)

# Tokens. TRL reads text, so a text is the numbers of its tokens.

def tokenizer(vocab_size, eos):
    words = {"<pad>": PAD, "<eos>": eos, **{str(i): i for i in range(1, vocab_size) if i != eos}}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def text(tokens):
    return "".join(f"{token} " for token in tokens)


def response(tokens):
    """The text without the EOS, which the SFT and DPO trainers append."""
    return text(tokens[:-1])


# Trainers.

def make(name, model, rows, eos, adapters, options, **others):
    if adapters:
        others["peft_config"] = lora_config(*adapters)
    with TemporaryDirectory() as folder:
        arguments = getattr(trl, f"{name}Config")(
            output_dir=folder, report_to=[], save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
            **{"use_cpu": True, "bf16": False, **options})
        trainer = getattr(trl, f"{name}Trainer")(
            model, args=arguments, processing_class=tokenizer(model.config.vocab_size, eos),
            train_dataset=datasets.Dataset.from_list(rows), **others)
    if adapters:
        load_adapters(trainer.model, adapters[1])
    if trainer.args.bf16:       # autocast around the model's forward, as trainer.train() puts it there
        trainer.accelerator.prepare_model(trainer.model)
    trainer.create_optimizer()
    return trainer


def lora_config(alpha, adapters):
    import peft
    return peft.LoraConfig(
        r=next(iter(adapters.values())).shape[1], lora_alpha=alpha, lora_dropout=0.0, task_type="CAUSAL_LM",
        target_modules=sorted({name.split(".")[2] for name in adapters}))


def load_adapters(model, adapters):
    """Put minilm's adapters, arrays by name, in the place of those that PEFT has drawn."""
    import peft
    unknown = peft.set_peft_model_state_dict(
        model, {peft_name(name): torch.from_numpy(a.T.copy()) for name, a in adapters.items()}).unexpected_keys
    assert not unknown, f"adapters that PEFT does not have: {unknown}"


def sft_trainer(config, weights, data, eos, adapters=None, **options):
    rows = [{"prompt": text(p), "completion": response(r)} for p, r in zip(data["prompts"], data["responses"])]
    return make("SFT", llama(config, weights), rows, eos, adapters, {
        "per_device_train_batch_size": len(rows), "max_length": None, **options})


def dpo_trainer(config, weights, data, eos, adapters=None, *, precompute_ref_log_probs, **options):
    """The reference is the initial policy. precompute_ref_log_probs: compute its log-probs once, without a second
    model."""
    rows = [{"prompt": text(p), "chosen": response(c), "rejected": response(r)}
            for p, c, r in zip(data["prompts"], data["chosen"], data["rejected"])]
    return make("DPO", llama(config, weights), rows, eos, adapters, {
        "per_device_train_batch_size": len(rows), "precompute_ref_log_probs": precompute_ref_log_probs, **options},
        ref_model=None if precompute_ref_log_probs or adapters else llama(config, weights))


def rloo_trainer(config, weights, reference, data, reward, adapters=None, **options):
    """reward: a function of a list of token lists. The EOS is no token of the model, so responses are as long as in
    data. reference: weights, or None with adapters."""
    prompts = data["prompts"]
    K = len(data["responses"]) // len(data["prompts"])
    rows = [{"prompt": text(p)} for p in prompts for _ in range(K)]
    model = llama(config, weights)
    with TemporaryDirectory() as folder:        # TRL loads the reference from here
        if reference:
            llama(config, reference).save_pretrained(folder)
            model.config._name_or_path = folder
        return make("RLOO", model, rows, config["vocab_size"], adapters, {
            "per_device_train_batch_size": len(rows), "num_generations": K,
            "max_completion_length": len(data["responses"][0]), **options},
            reward_funcs=lambda completion_ids, **_: reward(completion_ids))


# One step, as transformers' Trainer takes it.

def rows(trainer):
    """All data, tokenised."""
    return [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]


def backward(trainer, rows):
    """The loss (RLOO: samples and rewards first), and the gradients in the model."""
    trainer.current_gradient_accumulation_steps = 1
    batches, items = trainer.get_batch_samples(iter([trainer.data_collator(rows)]), 1, trainer.args.device)
    return trainer.training_step(trainer.model, batches[0], items)


def step(trainer, rows):
    backward(trainer, rows)
    trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.model.zero_grad()


def check(trainer, rows, responses):
    """For the comparison: ({name: number}, gradients): the loss (RLOO: the rewards and the KL of the given responses),
    and DPO's reference log-probs."""
    if isinstance(trainer, trl.RLOOTrainer):
        with mock.patch.object(trainer, "_generate_single_turn", lambda *_: responses):
            backward(trainer, rows)
        logged = trainer._metrics["train"]
        found = {"reward": logged["reward"][-1], "kl_token": logged["kl"][-1]}
    else:
        found = {"loss": backward(trainer, rows).item()}
    if isinstance(trainer, trl.DPOTrainer):
        batch = trainer._prepare_inputs(trainer.data_collator(rows))
        found["reference"] = torch.stack(
            [batch["ref_chosen_logps"], batch["ref_rejected_logps"]] if trainer.ref_model is None else
            [*trainer.compute_ref_log_probs(trainer.ref_model, batch)]).cpu().numpy()
    of_model = adapter_gradients(trainer.model) if is_peft_model(trainer.model) else gradients(trainer.model)
    trainer.model.zero_grad()
    return found, of_model


def adapter_gradients(model):
    """The gradients by minilm's names and in its layout."""
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:              # base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight
            *_, layer, _, matrix, which, _, _ = name.split(".")
            found[f"blocks.{layer}.{matrix}.lora_{which[-1].lower()}"] = p.grad.cpu().numpy().T
    return found
