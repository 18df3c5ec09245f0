"""Questions about SFT, reward models and DPO."""

import numpy as np

from minilm import Tensor, ops
from minilm.exercises.questions.question import Question
from minilm.objectives.dpo import dpo_loss, ipo_loss, robust_dpo_loss
from minilm.objectives.reward import reward_loss
from minilm.objectives.sft import sft_loss


def reference_is_the_policy() -> dict[str, float]:
    chosen, rejected = -np.random.default_rng(0).uniform(1, 50, size=(2, 8))
    return {f"loss with beta = {beta:g}": dpo_loss(chosen, rejected, chosen, rejected, beta).item()
            for beta in (0.1, 5.0)}


def chosen_falls() -> dict[str, float]:
    features = np.array([1.0, 2.0, -3.0])                   # of the chosen, the rejected and a third response

    def log_pi(theta):
        return ops.log_softmax(theta * features)

    theta = Tensor(np.zeros(1), requires_grad=True)
    before = log_pi(theta).data
    loss = dpo_loss(log_pi(theta)[0:1], log_pi(theta)[1:2], before[0:1], before[1:2], 1.0)
    loss.backward()
    after = log_pi(Tensor(theta.data - 0.1 * theta.grad)).data
    new_loss = dpo_loss(after[0:1], after[1:2], before[0:1], before[1:2], 1.0).item()
    return {"change of the loss": new_loss - loss.item(), "change of log pi(chosen)": after[0] - before[0],
            "change of log pi(rejected)": after[1] - before[1], "change of log pi(third)": after[2] - before[2]}


def a_constant_on_all_rewards() -> dict[str, float]:
    chosen, rejected = np.random.default_rng(0).normal(size=(2, 8))
    return {"loss": reward_loss(chosen, rejected).item(),
            "loss, all rewards + 100": reward_loss(chosen + 100, rejected + 100).item()}


def one_response_always_wins() -> dict[str, float]:
    numbers = {}
    for words, loss in (("DPO", dpo_loss), ("IPO", ipo_loss)):
        for delta in (4.0, 5.0, 50.0):
            leaf = Tensor(np.array([delta]), requires_grad=True)
            loss(leaf, *np.zeros((3, 1)), 0.1).backward()
            numbers[f"gradient of {words} in delta, delta = {delta:g}"] = leaf.grad[0]
    return numbers


def flipped_labels() -> dict[str, float]:
    q = 0.9 * 0.8 + 0.1 * 0.2                               # how often y is the preferred one, after the flips
    grid = np.arange(0, 3, 0.01)

    def minimum(loss, *options):
        def expected(z):
            a, zero = np.array([z]), np.zeros(1)
            return (q * loss(a, zero, zero, zero, 1.0, *options).item()
                    + (1 - q) * loss(zero, a, zero, zero, 1.0, *options).item())
        return float(min(grid, key=expected))

    return {"true difference of the rewards, log(0.8 / 0.2)": float(np.log(4)), "DPO": minimum(dpo_loss),
            "conservative DPO, smoothing 0.1": minimum(dpo_loss, 0.1),
            "robust DPO, flip rate 0.1": minimum(robust_dpo_loss, 0.1)}


def means_of_means() -> dict[str, float]:
    def gradient(total):
        leaves = [Tensor(-np.ones((1, n)), requires_grad=True) for n in (1, 9)]
        for leaf in leaves:
            mask = np.ones(leaf.shape, bool)
            loss = sft_loss(leaf, mask, total) if total else sft_loss(leaf, mask) / 2
            loss.backward()
        return [leaf.grad[0, 0] for leaf in leaves]

    own, common = gradient(None), gradient(10)
    return {"mean of two means: token of the short one": own[0], "mean of two means: token of the long one": own[1],
            "one mean of 10 tokens: token of the short one": common[0],
            "one mean of 10 tokens: token of the long one": common[1]}


QUESTIONS = (
    Question(
        "The DPO loss if the reference is the policy itself",
        "In the first step of DPO the reference is a copy of the policy. The responses have log-probs between -50 "
        "and -1. What is the loss, with beta = 0.1 and with beta = 5?",
        reference_is_the_policy, lambda n: all(abs(value - np.log(2)) < 1e-15 for value in n.values()),
        "log 2 = 0.693, whatever the responses and beta are: both log-ratios are 0, so delta is 0, and -log "
        "sigmoid(0) is log 2. If your first loss is another number, the reference is another model, or the two "
        "log-probs were computed in different ways (dropout, dtype, temperature, mask).",
        "minilm/objectives/dpo.py"),
    Question(
        "Does DPO make the chosen response more likely?",
        "Three responses have the logits theta, 2 theta and -3 theta, with one parameter theta = 0. The first is the "
        "chosen one, the second the rejected one. After one step of gradient descent on the DPO loss: does the loss "
        "fall? Does log pi of the chosen response rise?",
        chosen_falls,
        lambda n: n["change of log pi(rejected)"] < n["change of log pi(chosen)"] < 0 < n["change of log pi(third)"]
        and n["change of the loss"] < 0,
        "The loss falls, and the chosen response becomes less likely. The loss depends on the difference of the two "
        "log-probs only. The gradients of both point the same way, the rejected one's is longer, and so both fall; the "
        "probability goes to a response that nobody compared.",
        "minilm/objectives/dpo.py, step 5"),
    Question(
        "Add 100 to every reward",
        "A reward model has some Bradley-Terry loss on 8 pairs. You add 100 to all its rewards. What happens to the "
        "loss?",
        a_constant_on_all_rewards, lambda n: abs(n["loss"] - n["loss, all rewards + 100"]) < 1e-12,
        "Nothing: the loss depends on differences of rewards alone. Comparisons determine the rewards of a prompt "
        "only up to a constant, so rewards of two prompts cannot be compared, and a baseline or the centering term "
        "must fix the constant.",
        "minilm/objectives/reward.py"),
    Question(
        "One response always wins: where does delta end?",
        "In the data, y_w is always preferred to y_l, and beta = 0.1. With DPO, is there a delta at which the "
        "gradient is 0? With IPO, which?",
        one_response_always_wins,
        lambda n: all(n[f"gradient of DPO in delta, delta = {d}"] < -1e-4 for d in (4, 5, 50))
        and abs(n["gradient of IPO in delta, delta = 5"]) < 1e-12
        and n["gradient of IPO in delta, delta = 4"] < 0 < n["gradient of IPO in delta, delta = 50"],
        "DPO's gradient is -beta sigmoid(-beta delta), which is below 0 for every delta: training pushes delta to "
        "infinity, and beta only sets how fast. IPO's loss is (delta - 1/(2 beta))^2, which ends "
        "at delta = 5.",
        "minilm/objectives/dpo.py, ipo_loss"),
    Question(
        "A tenth of the labels is flipped",
        "y is preferred to y' with probability 0.8, so the rewards differ by log 4 = 1.386. A tenth of the labels is "
        "flipped. With unlimited data and beta = 1: at which difference does the loss of DPO have its minimum? Does "
        "label smoothing of 0.1 (conservative DPO) undo the flips?",
        flipped_labels,
        lambda n: n["conservative DPO, smoothing 0.1"] < n["DPO"] - 0.1 < 1.0 and abs(n["DPO"] - 1.046) < 0.01
        and abs(n["robust DPO, flip rate 0.1"] - np.log(4)) < 0.01,
        "y now wins with probability 0.9 * 0.8 + 0.1 * 0.2 = 0.74, and DPO ends at log(0.74 / 0.26) = 1.05. Smoothing "
        "flips a tenth of the labels once more, so conservative DPO ends still lower. The robust loss, which subtracts "
        "the flipped one, ends at the true difference.",
        "minilm/objectives/dpo.py, robust_dpo_loss"),
    Question(
        "The mean of two means",
        "A batch has two responses, of 1 and of 9 tokens. Somebody computes the mean loss of each response and "
        "averages the two. How large is the gradient of a log-prob of the short response, compared with one of the "
        "long response?",
        means_of_means,
        lambda n: np.allclose(list(n.values()), [-1 / 2, -1 / 18, -1 / 10, -1 / 10], 1e-12),
        "Nine times as large: 1/2 against 1/18. With one mean over all 10 tokens each has 1/10. The same happens to "
        "microbatches that are each divided by their own number of tokens: divide by the number of the whole batch.",
        "minilm/objectives/sft.py, total"))
