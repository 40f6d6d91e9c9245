"""One command for a machine with a GPU: `make gpu-check OUT=FOLDER`, or `PYTHONPATH=tests python -m gpu --out FOLDER`
from the repository (not `tests.gpu`: some package in an environment may bring a `tests` of its own).

In at most six minutes, without a network: what the machine is, the tests that must hold on a GPU, memory and time of
every step at the size of LLaVA-1.5-7B (random weights), and the small world's captions beside those of a CPU.
"""
