"""CPU kernels, compiled by numba: what torch's operators do in many passes over memory, in one or two.

``native`` is what a kernel is made of, the modules beside it hold the kernels, ``build`` compiles them into a cache
directory and loads them from there. Only ``models.ops`` calls them.
"""
