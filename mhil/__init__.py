"""Distributed class-incremental learning in JAX and Flax.

Letters used alike in einsums, shape annotations and comments:

  b  batch            c  classes of a head    d  features
  f  hidden units     h  heads                l  heads held by one device
  m  buffer slots     n  subnets              s  stages
  t  tasks            w  workers

Arrays of the bank of heads start with `l h`: head `i` is entry
`divmod(i, h)`, and the second axis lies over the mesh's `head` axis.
"""
