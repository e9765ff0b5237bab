"""bc2exp: Baichuan2 7B and 13B, trained correctly on NPUs, GPUs and CPUs with one configuration."""

__version__ = "0.1.0"
