"""The public ops, a file for each family: lora, norms (gram, delta_norms, tail_norms), aggregate, truncate, quantize, cross_entropy.

A file has the contract, the checks, the shape function and, where there are gradients, autograd. The optimisers' ops are in hetlora_kernels/optim.py.
`_library.call` finds the kernels.
"""
