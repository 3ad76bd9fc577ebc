"""The mathematics of BLPO on plain tensors: nothing in this package imports Ray."""
