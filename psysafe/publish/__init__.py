"""A run becomes a repository on the Hugging Face hub: the card, the files, the push."""
