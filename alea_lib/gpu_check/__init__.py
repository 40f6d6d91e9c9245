"""One command for a machine with a GPU: `python -m alea_lib.gpu_check --out FOLDER`, or `make gpu-check OUT=FOLDER`.

In at most six minutes, without a network: what the machine is, the tests that must hold on a GPU, memory and time of
every step at the size of LLaVA-1.5-7B (random weights), and the small world's captions beside those of a CPU.
"""
