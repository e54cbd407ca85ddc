"""Time, memory and accuracy of the operations here beside what one would write without them, and beside peers.

python -m kernels.bench OPERATION [--help]
"""
