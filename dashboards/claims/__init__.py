"""The sentences of the paper (arXiv:2603.21316v1) as claims, one file for each of its parts, in its order."""
