"""From a model that continues texts to one that answers: fine-tuning, preferences, rewards, policy gradient, merging."""
