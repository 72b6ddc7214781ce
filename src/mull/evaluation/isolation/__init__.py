"""How a program that a model wrote is run: a container, the two processes that talk across its wall, and the checks of its layers."""
