"""One file per op: contract, checks, fake and autograd. The kernels are elsewhere; `_library.call` finds them."""
