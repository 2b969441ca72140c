"""metabench: measure meta-learning algorithms, quality and cost, on identical episodes."""

__version__ = "0.1.0"
