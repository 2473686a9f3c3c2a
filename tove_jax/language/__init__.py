"""Text from language models: decoding, ranking of answers."""
