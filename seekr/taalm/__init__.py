"""Train-Attention: a second model learns which tokens of a document are worth learning from."""
