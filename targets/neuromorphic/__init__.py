"""Neuromorphic chips and simulators: their arithmetic in plain numpy, quantization to it, rules, dialects and figures."""
