"""The objectives, one page each: sft, reward, policy_gradient, dpo, kl.

Each page has the same order: the formula and its gradient with the proof, the loss, its variants, the
metrics, private helpers. A page needs only NumPy and the first lines of tensor.py: `@primitive` turns a
function that returns (output, vjp) into a function of Tensors; vjp maps the gradient of the output to the
gradients of the inputs. The functions take log-probs and rewards, never a model. Numbers that need a
gradient come as Tensors; references, masks, old log-probs and advantages are plain arrays.

Symbols on every page:

    x, y          a prompt, a response to it;  y_t is token t of y, y_<t the tokens before it
    y_w, y_l      the preferred response (`chosen` in code), the other one (`rejected`)
    pi, pi_ref    the policy, and the fixed reference; log pi(y|x) is the sum over the tokens of y
    r(x,y)        the reward;  beta: the weight of the KL penalty
    m_t           the mask: 1 on the tokens of a response and its EOS, 0 on prompt and padding
    B, T          sequences or pairs in a batch, tokens in a sequence
    P, K, N       prompts, samples for each prompt, N = P K samples in all

How to add an objective: .github/CONTRIBUTING.md. Whether the expected gradient of an estimator is the
gradient that you mean: minilm.exact.gradients.compare_with_exact_gradient.
"""
