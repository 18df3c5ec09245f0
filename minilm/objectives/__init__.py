"""The objectives, one page each: sft, reward, policy_gradient, dpo, kl.

They take log-probs and rewards, never a model. What the policy or the reward model computed
comes as a Tensor; references, masks, old log-probs and advantages are plain arrays.
"""
