"""From a waveform to logits: frontends, blocks and the classifier they make. Knows nothing of data sets."""
