"""Log-prob and entropy of chosen tokens from hidden states, without ever holding all logits."""
