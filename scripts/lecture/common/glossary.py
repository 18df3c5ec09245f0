"""The terms and the formulas that the page of claims explains: plain HTML, written by hand; and the words of the
table in scripts/lecture/README.md."""

TERMS = {
    "prompt x, response y": "The text that the model is given, and the text that it writes.",
    "policy π, reference π_ref":
        "The model that is trained, and the model that it starts from. π(y|x) is the probability of response "
        "y to prompt x.",
    "SFT model": "The model after supervised finetuning on demonstrations. In stage 3 it is the reference.",
    "gold reward":
        "The preference of the people of the invented world, as a number per response. It is known exactly, "
        "because the world is constructed; in reality nobody knows it.",
    "proxy reward":
        "The prediction of a reward model that was fitted to comparisons. No training stage sees the gold reward; "
        "RLHF sees "
        "the proxy reward, DPO the comparisons.",
    "comparison": "Two responses to one prompt, and which of them a person prefers.",
    "Bradley-Terry":
        "A person prefers the first response with probability σ(r₁ − r₂), with σ(z) = 1 / (1 + e⁻ᶻ).",
    "KL (in nats)":
        "The Kullback-Leibler divergence KL(π ‖ π_ref) = E[log π(y|x) − log π_ref(y|x)] over responses y "
        "from π: how far the policy has moved from the reference. A nat is 1.44 bits.",
    "β": "The price of one nat of KL in units of reward.",
    "π*":
        "The policy with the largest expected reward minus β KL. It has a closed form, given above, and is "
        "computed exactly here.",
    "at a lower temperature":
        "The reference with its logits divided by a temperature below 1. It moves away from the reference "
        "without any label, so it is the baseline at equal KL.",
    "greedy decoding": "At every step the most probable token is taken: temperature 0.",
    "best of n": "Of n sampled responses the one with the largest reward.",
    "held out": "Never used in training.",
    "seed": "One repetition with other random numbers: other weights, other data, other order.",
    "95% interval": "Where the mean over all possible seeds lies with 95% confidence (Student's t).",
    "mean [least, greatest]": "So the tables of numbers give a measurement over the seeds.",
}

# Words of single experiments, for the page and for README.md.
WORDS = {
    "bound": "The best accuracy possible from the tokens that the model is given, computed exactly.",
    "both texts, the chain":
        "The two texts of pretrain: a random Markov chain (the next of 10 tokens depends on the last two), whose "
        "entropy is known, and English.",
    "known tasks, new tasks": "Tasks on strings that were in the documents of pretraining, and tasks that were not.",
    "direct, worked, with dots":
        "Three kinds of examples of a sum: the answer alone; its steps, then the answer; dots in place of the "
        "steps, then the answer.",
    "best single operation or training task":
        "A rival in unseen_tasks that needs no model: for each held-out task, the answers of one operation alone, or "
        "of "
        "a training task that shares an operation, whichever are right most often.",
    "the country follows from the city":
        "In multiple_choice every city lies in one country. Some countries are never stated, but can be inferred.",
    "harmless, careless":
        "Alterations of demonstrations in uniform_penalty. Harmless: the sentences before the answer stand after it "
        "and "
        "the other way round, at no loss of reward. Careless: another answer.",
    "gain of a group":
        "In imperfect_preference: expected utility on a scale from 0 (the SFT model) to 1 (pi* of the group's own "
        "utility).",
    "equal errors, spread of the offsets":
        "In pairwise people rate from 1 to 7 and add a personal offset to all ratings; its standard deviation is the "
        "spread, in grades. Equal errors: the difference of two ratings has as much noise as a choice.",
    "demonstrations alone of the same cost":
        "The price of a demonstration is an assumption of demo_cost: one comparison, or four comparisons.",
}
IN_THE_TABLE = {
    "gold reward": TERMS["gold reward"], "proxy reward": TERMS["proxy reward"],
    "pi*, J, J*":
        "J is the expected reward minus beta KL; the row says which reward, gold or proxy. pi* is the policy with the "
        "largest J, and J* is its J. Both are computed exactly. Where a share of J* is measured, rewards are shifted "
        "so "
        "that the SFT model has J = 0.",
    "KL": "How far a policy has moved from the SFT model, in nats: E[log pi(y|x) - log pi_ref(y|x)], y from pi.",
    **WORDS,
}

FORMULAS = {
    "Supervised finetuning (SFT)":
        "L = −Σ<sub>t</sub> log π(y<sub>t</sub> | x, y<sub>&lt;t</sub>) / (tokens of the responses)",
    "Reward model":
        "L = −log σ( r(x, y<sub>w</sub>) − r(x, y<sub>l</sub>) ), y<sub>w</sub> preferred to y<sub>l</sub>",
    "RLHF: policy gradient with a KL penalty":
        "maximise J = E<sub>y∼π</sub>[ r(x, y) ] − β KL(π ‖ π<sub>ref</sub>); "
        "the maximum is π*(y|x) = π<sub>ref</sub>(y|x) exp(r(x, y) / β) / Z(x)",
    "DPO":
        "L = −log σ( β [ log π(y<sub>w</sub>|x) − log π<sub>ref</sub>(y<sub>w</sub>|x) ] "
        "− β [ log π(y<sub>l</sub>|x) − log π<sub>ref</sub>(y<sub>l</sub>|x) ] )",
}
