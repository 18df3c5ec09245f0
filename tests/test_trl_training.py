"""Twenty steps of SFT, reward model and DPO, whole and with adapters, have the losses and metrics of TRL's trainers."""
import argparse
import json

import numpy as np
import pytest

from minilm.lora import Adapted
from minilm.model import RewardModel
from minilm.pretrained import load, save
from minilm.pretrained.adapter_folder import load_adapters, peft_name
from minilm.pretrained.encoding import encoding_of
from minilm.pretrained.llama_names import hugging_face_names, split
from minilm.pretrained.training_data import demonstrations, pairs
from minilm.stages.dpo import reference_log_probs, train_dpo
from minilm.stages.reward_model import train_reward_model
from minilm.stages.sft import train_sft
from minilm.stages.train_state import TrainState
from support.align_stages import Stage
from test_pretrained import CHAT, SHAPES, model_of

safetensors = pytest.importorskip("safetensors.numpy", reason="needs safetensors: pip install safetensors")
pytestmark = pytest.mark.parity
STEPS, BATCH = 20, 4
WORDS = "sun moon star rain wind snow tree leaf rock sand fish bird".split()
# The largest relative difference of a loss (2e-6 is seen), and of all updates together (4e-6).
LOSSES, UPDATES = 1e-5, 1e-4


@pytest.fixture(scope="module")
def libraries():
    pytest.importorskip("torch", reason="needs PyTorch: pip install torch==2.13.0")
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    return pytest.importorskip("trl", reason="needs TRL: pip install trl==1.16.0"), peft


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a model, and lines for each stage: more words than in the tests of the other files."""
    folder = tmp_path_factory.mktemp("work")
    model = model_of({**SHAPES["as SmolLM2"], "context": 512})
    for name, p in model.parameters().items():
        if not name.endswith("norm"):
            p.data *= 0.4
    save(model, CHAT, folder / "model")
    write_lines(folder)
    return folder


def write_lines(folder, system=()):
    """pairs.jsonl and sft.jsonl of 24 lines each; system: messages before each question."""
    rng = np.random.default_rng(0)

    def message(role, count):
        return {"role": role, "content": " ".join(rng.choice(WORDS, count))}
    lines = [{"prompt": [*system, message("user", 3)], "chosen": [message("assistant", 4)],
              "rejected": [message("assistant", 6)]} for _ in range(24)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "sft.jsonl").write_text("".join(
        json.dumps({"prompt": line["prompt"], "completion": line["chosen"]}) + "\n" for line in lines))


class Recorded:
    """A trainer of TRL, run: its logs by step, the order of its examples, the model and the first adapters.

    settings: of its Config, in place of those below. All rows of the embedding are trained: see the test below.
    """

    def __init__(self, libraries, work, out, stage, adapters, **settings):
        import datasets
        import torch
        import transformers
        trl, peft = libraries
        kind = {"sft": ("SFTTrainer", "SFTConfig"), "dpo": ("DPOTrainer", "DPOConfig"),
                "reward": ("RewardTrainer", "RewardConfig")}[stage]
        common = {"output_dir": str(out), "report_to": [], "use_cpu": True, "per_device_train_batch_size": BATCH,
                  "max_steps": STEPS, "learning_rate": 1e-2 if adapters else 2e-3, "logging_steps": 1, "seed": 3,
                  "save_strategy": "no", "gradient_checkpointing": False, "bf16": False, "disable_dropout": True}
        common |= settings
        if stage == "sft":
            del common["disable_dropout"]
        tokenizer = transformers.AutoTokenizer.from_pretrained(work / "model")
        tokenizer.pad_token = "<|endoftext|>"
        load_model = (transformers.AutoModelForSequenceClassification if stage == "reward"
                      else transformers.AutoModelForCausalLM)
        options = {"num_labels": 1} if stage == "reward" else {}
        torch.manual_seed(1)
        model = load_model.from_pretrained(work / "model", dtype=torch.float32, **options)
        model.get_input_embeddings().padding_idx = None
        if stage == "reward":
            model.config.pad_token_id = tokenizer.pad_token_id
            self.head = model.score.weight.detach().numpy().copy()
        matrices = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
        lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=matrices, lora_dropout=0.0,
                               task_type="SEQ_CLS" if stage == "reward" else "CAUSAL_LM")
        rows = [json.loads(line) for line in (work / f"{'sft' if stage == 'sft' else 'pairs'}.jsonl").open()]
        dataset = datasets.Dataset.from_list([{**row, "place": i} for i, row in enumerate(rows)])
        trainer = getattr(trl, kind[0])(model, args=getattr(trl, kind[1])(**common), train_dataset=dataset,
                                        processing_class=tokenizer, **({"peft_config": lora} if adapters else {}))
        self.first = out / "first"
        if adapters:
            trainer.model.save_pretrained(self.first)
            without_head(self.first)
        self.order = []
        collate = trainer.data_collator
        fields = ("input_ids",) if stage == "sft" else ("chosen_ids",)
        keys = {tuple(row[fields[0]]) if stage != "dpo" else tuple(row["prompt_ids"] + row["chosen_ids"]): i
                for i, row in enumerate(trainer.train_dataset)}

        def recording(examples):
            self.order.append([keys[tuple(e["prompt_ids"] + e["chosen_ids"]) if stage == "dpo" else tuple(e[fields[0]])]
                               for e in examples])
            return collate(examples)
        trainer.data_collator = recording
        trainer.train()
        self.logs = [log for log in trainer.state.log_history if "loss" in log]
        self.model = trainer.model
        self.rate = common["learning_rate"]


def without_head(folder):
    """Adapters as lora.py has them: of a classifier PEFT also saves its head, which Recorded keeps."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": None}))
    tensors = safetensors.load_file(folder / "adapter_model.safetensors")
    safetensors.save_file({name: x for name, x in tensors.items() if "score" not in name},
                          folder / "adapter_model.safetensors")


def run_ours(stage, work, theirs, adapters):
    """(metrics of each step, the model) of our stage on the examples in the order of their trainer."""
    model, tokenizer = load(work / "model")
    body = load_adapters(model, theirs.first) if adapters else model.copy()
    encoding = encoding_of(tokenizer)
    subject = RewardModel.of(body, theirs.head.T) if stage == "reward" else body
    state = TrainState(subject, np.random.default_rng(0), betas=(0.9, 0.999), weight_decay=0.0)
    given = {"learning_rate": lambda step: theirs.rate * (1 - step / STEPS), "batches": theirs.order[:STEPS]}
    if stage == "sft":
        examples = demonstrations(encoding, work / "sft.jsonl", 500)
        steps = train_sft(state, examples.prompts, examples.responses["responses"], STEPS, BATCH, **given)
    else:
        examples = pairs(encoding, work / "pairs.jsonl", 500)
        sides = examples.responses.values()
        if stage == "reward":
            steps = train_reward_model(state, examples.prompts, *sides, STEPS, BATCH, **given)
        else:
            references = [reference_log_probs(model, examples.prompts, side) for side in sides]
            steps = train_dpo(state, examples.prompts, *sides, *references, STEPS, BATCH, **given)
    counts = Stage(argparse.Namespace(epochs=1, batch_size=BATCH, seed=0), None, examples, (), None)
    counts.batches, ours, tokens = theirs.order, [], 0
    for metrics in steps:
        tokens += counts.tokens(len(ours), metrics)
        ours.append({**metrics, "num_tokens": tokens})
    return ours, body


# Under TRL's names.
METRICS = {"sft": (), "reward": ("accuracy", "margin", "min_reward", "mean_reward", "max_reward"),
           "dpo": ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
                   "logps/rejected")}


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_losses_and_metrics_of_twenty_steps_are_those_of_trl(libraries, work, tmp_path, stage, adapters):
    assert_training_is_theirs(Recorded(libraries, work, tmp_path, stage, adapters), stage, work, adapters, LOSSES,
                              UPDATES)


def assert_training_is_theirs(theirs, stage, work, adapters, losses, updates):
    """Ours on the examples of a Recorded: losses to a relative difference, metrics, and updates as a whole."""
    ours, model = run_ours(stage, work, theirs, adapters)
    assert len(theirs.logs) == len(ours) == STEPS
    expected, found = (np.array([line["loss"] for line in lines]) for lines in (theirs.logs, ours))
    assert expected[-1] < expected[0]
    np.testing.assert_allclose(found, expected, rtol=losses)
    np.testing.assert_allclose([m["learning_rate"] for m in ours], [log["learning_rate"] for log in theirs.logs])
    assert [m["num_tokens"] for m in ours] == [log["num_tokens"] for log in theirs.logs]
    for name in ("grad_norm", *METRICS[stage]):
        first = name == "rewards/accuracies"        # policy and reference are equal at first: rounding makes the margin
        found, expected = [m[name] for m in ours[first:]], [log[name] for log in theirs.logs[first:]]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4, err_msg=name)
    assert isinstance(model, Adapted) == adapters
    assert difference_of_updates(model, theirs, work, adapters) < updates


def difference_of_updates(model, theirs, work, adapters):
    """|our last weights - theirs| / |our last weights - the first ones|, of all weights or adapters together."""
    start, _ = load(work / "model")
    if adapters:
        start = load_adapters(start, theirs.first)
    here, before = (weights_by_name(m) for m in (model, start))
    there = {name.replace(".default.weight", ".weight"): p.detach().numpy()
             for name, p in theirs.model.state_dict().items()}
    difference = sum(((w - there[name]) ** 2).sum() for name, w in here.items() if name != "lm_head.weight")
    return (difference / sum(((w - before[name]) ** 2).sum() for name, w in here.items())) ** 0.5


def weights_by_name(model):
    """{Hugging Face's or PEFT's name: array}"""
    if isinstance(model, Adapted):
        return {peft_name(name): p.data.T for name, p in model.parameters().items()}
    found = {}
    for name, parts in hugging_face_names(model.config).items():
        w = model.parameters()[name].data
        matrices = [w] if name.endswith(("norm", "embedding")) else [m.T for m in split(model.config, name, w)]
        found |= dict(zip(parts, matrices))
    return found


@pytest.mark.parametrize("padding_is_trained", [False, True])
def test_transformers_gives_the_padding_token_no_gradient_as_an_input(libraries, work, padding_is_trained):
    """Here that token is <|im_end|>, as in SmolLM2, and every message ends with it. Recorded sets padding_idx to None:
    then transformers, like minilm, trains its row as it trains any other."""
    import torch
    import transformers
    model, tokenizer = load(work / "model")
    ids = np.array([tokenizer.encode_chat([{"role": "user", "content": "sun moon"}])])
    padding = tokenizer.eos
    theirs = transformers.AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32,
                                                               pad_token_id=padding)
    if padding_is_trained:
        theirs.get_input_embeddings().padding_idx = None
    theirs(torch.tensor(ids), labels=torch.tensor(ids)).loss.backward()
    (-model.log_probs(ids).mean()).backward()
    ours, expected = model.parameters()["embedding"].grad, theirs.get_input_embeddings().weight.grad.numpy()
    different = abs(ours - expected).max(axis=1) > 1e-5 * abs(ours).max()
    assert different.nonzero()[0].tolist() == ([] if padding_is_trained else [padding])
