"""The exact world: so small that every response is listed, and every expectation is a sum.

It answers questions about objectives without sampling error. Where does training end, and how far is that
from pi*? Is the expected gradient of my estimator the gradient that I think? What does a step on one pair
do to all other responses?

    enumerable.py    the world; J, KL, entropy, total variation, the optimum pi*, best-of-n
    expectations.py  gradients of expected losses over comparisons and over samples; exact training
    gradients.py     an estimator's expected gradient against the exact one, at weights of order 1: drawn
                     with standard deviation 0.7, because a fresh Transformer is almost uniform, and a
                     wrong gradient can look right there
    bias.py          the same in one call, for a loss of samples: ours, PyTorch's, any function of arrays

Arrays are (P,Y): P prompts, Y responses listed for each prompt.

Your own reward: any table (P,Y) of numbers. Here each token 2 in a response is worth 1.

    import numpy as np
    from minilm.exact.enumerable import EnumerableWorld, objective, objective_gradient, optimum, total_variation
    from minilm.exact.expectations import descend
    from minilm.model import Config, Transformer

    world = EnumerableWorld(prompts=[[1, 2], [2, 1]], vocab_size=3, max_new_tokens=3)
    rewards = np.array([[response.count(2) for response in world.responses] for prompt in world.prompts])
    config = Config(vocab_size=3, width=16, layers=2, heads=2, context=8)
    policy = Transformer(config, np.random.default_rng(0), np.float64)
    beta = 0.5
    reference = world.log_probs(policy).data                        # log pi_ref (P,Y)
    best, log_Z = optimum(reference, rewards, beta)                 # log pi* (P,Y), and J* = beta log Z

    def gradient(log_pi):
        return -objective_gradient(log_pi, reference, rewards, beta)

    *_, log_pi = descend(policy, world, gradient, steps=200, learning_rate=0.01)
    print(objective(log_pi, reference, rewards, beta) / (beta * log_Z))     # 0.99775 0.99757: J / J*
    print(total_variation(log_pi, best))                                    # 0.0149 0.0156: distance from pi*

Your own PyTorch policy in the same world: anything that scores world.tokens.

    import torch
    torch.manual_seed(0)
    torch.set_num_threads(1)                                        # faster for such small arrays
    embed = torch.nn.Embedding(3, 32)
    gru = torch.nn.GRU(32, 32, batch_first=True)
    head = torch.nn.Linear(32, 3)
    parameters = [*embed.parameters(), *gru.parameters(), *head.parameters()]
    tokens, mask, r = (torch.tensor(array) for array in (world.tokens, world.mask, rewards))

    def torch_log_probs():                                          # log pi(y|x) (P,Y)
        log_pi = head(gru(embed(tokens[:, :-1]))[0]).log_softmax(-1)
        log_pi = log_pi.gather(-1, tokens[:, 1:, None])[..., 0].view(mask.shape)
        return (log_pi * mask).sum(-1)

    log_ref = torch_log_probs().detach()
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    for step in range(200):                                         # your loss here
        log_pi = torch_log_probs()
        loss = -(log_pi.exp() * (r - beta * (log_pi - log_ref))).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    log_pi = torch_log_probs().detach().numpy()
    log_ref = log_ref.numpy()
    best, log_Z = optimum(log_ref, rewards, beta)
    print(objective(log_pi, log_ref, rewards, beta) / (beta * log_Z))       # 0.99999 0.99999: J / J*
    print(total_variation(log_pi, best))                                    # 0.0012 0.0013: distance from pi*

tests/test_exact_examples.py runs both, and holds the printed numbers against the comments.
"""
