"""How a program that a model wrote is run: a container, two processes that talk across its wall, and checks of its layers."""
