"""Train the network of model.py (a few seconds) and print its accuracy: python examples/digits/train.py"""

from model import accuracy, build

print(f"float accuracy on the 600 held-back digits: {accuracy(build()):.2f} %")
