"""The objectives, one page each, in the order of reading: sft, reward, kl, policy_gradient, dpo.

Each page has the same order: the formula and its gradient with the proof, the loss, its variants, the
metrics, private helpers. A page needs only NumPy and the first lines of tensor.py: `@primitive` turns a
function of arrays that returns (output, vjp) into a function of Tensors. The annotation Tensor is the type that
the caller passes; inside the function every Tensor is already its array. vjp maps the gradient of the output
to one gradient for each of the first arguments; the references and masks after them get none. A function
without @primitive works on the Tensors themselves. The functions take log-probs and rewards, never a model.
Numbers that need a gradient come as Tensors; references, masks, old log-probs and advantages are plain arrays.

Symbols on every page:

    x, y          a prompt, a complete response to it;  y_t is token t of y, y_<t the tokens before it
    y_w, y_l      the preferred response (`chosen` in code), the other one (`rejected`)
    pi, pi_ref    the policy, and the fixed reference; both are above 0 for every response, as a softmax is.
                  log pi(y|x) is the sum of the log-probs of the tokens of y
    r(x,y)        the reward;  beta: the weight of the KL penalty
    k1            log pi(y|x) - log pi_ref(y|x): an estimate of KL(pi || pi_ref) from one y drawn from pi
    R             r - beta k1, the reward minus the KL penalty
    m_t           the mask: 1 on the tokens of a response, 0 on prompt and padding
    B, T          sequences or pairs in a batch, predicted tokens in a sequence: n tokens have T = n - 1
                  log-probs, because the first token is not predicted (plain.py counts all, and writes (B,T-1))
    P, K, N       prompts, samples for each prompt, N = P K samples in all

A complete response ends with an EOS token, which is one of its tokens, or at the limit of its length. No
complete response is the beginning of another one. So the probabilities pi(y|x) of all complete responses add
up to 1, and sum_y grad pi(y|x) = grad 1 = 0. The proofs use this.

How to add an objective: .github/CONTRIBUTING.md. Whether the expected gradient of an estimator is the
gradient that you mean: minilm.exact.gradients.compare_with_exact_gradient.
"""
